"""What a run will take, and everything that keeps it from starting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Final

from protocol import console
from protocol.errors import Refused

if TYPE_CHECKING:
    from coordinator.folder import RunFolder
    from coordinator.ingest import Corpus
    from protocol.runspec import RunSpec

PASSES_MANY: Final = 4  # repeating text more often teaches little (arXiv 2305.16264)


def examine(folder: RunFolder, spec: RunSpec) -> tuple[dict[str, Any], list[Refused], list[str]]:
    """What is known of the run, everything that keeps it from starting, and what a person may want to change."""
    from coordinator import folder as parts
    from protocol.runspec import RunSpec

    facts: dict[str, Any] = {"name": spec.run.name, "architecture": spec.model.architecture, "codec": spec.update.codec}
    problems: list[Refused] = []
    notes: list[str] = []
    corpus: Corpus | None = None
    with closing(folder.open_store()) as store, _collecting(problems):
        signed = folder.manifest(store)
        facts["started"] = signed is not None
        if signed is not None:
            with _collecting(problems):
                parts.check_unchanged(spec, RunSpec.from_json(signed.manifest.spec))
        corpus = folder.corpus(store)
        facts["data"] = corpus_facts(corpus)
        parts.check_data(spec, corpus, folder.open_blobs())
    with _collecting(problems):
        if corpus is not None:
            vocabulary, sequences = corpus.vocabulary, corpus.sequences
        else:
            vocabulary, sequences = 257, 0  # bytes, until there is data
        from coordinator.plan import plan
        from protocol import model

        config = model.model_config(
            spec.model.architecture, spec.model.config, vocabulary=vocabulary, context=spec.data.context
        )
        parameters = model.measure(config).parameters
        planned = plan(spec, parameters=parameters, vocabulary=vocabulary, sequences=sequences)
        facts["plan"] = dict(vars(planned))
        if planned.passes is not None and planned.passes > PASSES_MANY:
            notes.append(f"The run reads its data {planned.passes:.1f} times; more text would teach it more.")
    return facts, problems, notes


@contextmanager
def _collecting(problems: list[Refused]) -> Iterator[None]:
    try:
        yield
    except Refused as refused:
        problems.append(refused)


def plan_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("run", str(facts["name"]))]
    size = console.size_text
    if (plan := facts.get("plan")) is not None:
        rows += [
            ("model", f"{facts['architecture']}, {plan['parameters']:,} parameters"),
            (
                "one round",
                f"a node sends {size(plan['round_bytes'])} and receives as much ({facts['codec']}, {plan['exchange']} of"
                f" {plan['nodes']} nodes; never over {size(plan['round_bytes_many'])})",
            ),
            *_codec_rows(plan, size),
            (
                "",
                f"a node trains on {plan['sequences_first']:,} sequences at first, {plan['sequences_last']:,} at last",
            ),
            memory_row(plan),
        ]
    if (data := facts.get("data")) is not None:
        rows.append(("data", f"{data['tokens']:,} tokens in {data['sequences']:,} sequences of {data['context']}"))
        rows.append(("held out", f"{data['heldout_tokens']:,} tokens"))
    if plan is not None:
        planned = plan["tokens_planned"]
        passes = f", {plan['passes']:.2f} times the data" if plan["passes"] is not None else ""
        rows.append(("planned", "without end" if planned is None else f"{planned:,} tokens{passes}"))
    return rows


def memory_row(plan: Mapping[str, Any]) -> tuple[str, str]:
    size = console.size_text
    trainer, others = size(plan["memory_trainer_bytes"]), size(plan["memory_helpers_bytes"])
    return "memory", f"a node's trainer takes {trainer} and its activations, its other processes {others}"


def _codec_rows(plan: Mapping[str, Any], size: Callable[[float], str]) -> list[tuple[str, str]]:
    """What each codec would send, so that the trade can be seen before the run begins."""
    rows: list[tuple[str, str]] = []
    for codec, sent in plan["uploads"].items():
        text = ", ".join(f"{size(each)} with {nodes} nodes" for nodes, each in sent.items())
        rows.append(("with" if not rows else "", f"{codec}: {text}"))
    if plan["round_seconds_min"]:
        text = f"at least {plan['round_seconds_min']:,.0f} s a round with {plan['nodes']} nodes, for the cap on uploads"
        rows.append(("pace", text))
    return rows


def corpus_facts(corpus: Corpus) -> dict[str, Any]:
    return {
        "documents": corpus.documents,
        "tokens": corpus.tokens,
        "sequences": corpus.sequences,
        "shards": len(corpus.shards),
        "heldout_documents": corpus.heldout_documents,
        "heldout_tokens": corpus.heldout.tokens,
        "skipped": dict(vars(corpus.skipped)),
        "tokenizer": "bytes" if corpus.tokenizer is None else corpus.tokenizer.digest,
        "vocabulary": corpus.vocabulary,
        "context": corpus.context,
    }


def corpus_rows(corpus: Corpus) -> list[tuple[str, str]]:
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in vars(corpus.skipped).items() if count)
    kind = "bytes" if corpus.tokenizer is None else f"tokenizer {corpus.tokenizer.digest[:12]}"
    return [
        ("documents", f"{corpus.documents:,}"),
        ("tokens", f"{corpus.tokens:,} to train on: {corpus.sequences:,} sequences of {corpus.context}"),
        ("held out", f"{corpus.heldout_documents:,} documents, {corpus.heldout.tokens:,} tokens"),
        ("left out", left_out or "nothing"),
        ("shards", f"{len(corpus.shards):,}"),
        ("vocabulary", f"{corpus.vocabulary:,} ({kind})"),
    ]
