"""`barnraise-coordinator`, the researcher's command. Turns words into one run's folder, and outcomes into exit codes.

Only `check`, `start` and `export` load the model; every other word answers at once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from protocol import console
from protocol.errors import Code, Exit, Refused

if TYPE_CHECKING:
    from coordinator.core.ledger import Books
    from coordinator.folder import RunFolder
    from coordinator.ingest import Corpus, Progress
    from coordinator.ledger import Verdict
    from coordinator.store import Evaluation, Order, Store
    from coordinator.tokenizer import Tokenizer
    from protocol.address import Address
    from protocol.runspec import RunSpec

RUNS_DEPTH: Final = 3  # folders below the one that `runs` is asked about
SHORT_ID: Final = 8  # characters that tell nodes apart on a screen
PASSES_MANY: Final = 4  # repeating text more often teaches little (arXiv 2305.16264)
ANSWER_SECONDS: Final = 30.0  # a coordinator that runs looks for orders twice a second
ASK_SECONDS: Final = 0.2
_VIRTUAL: Final = ("docker", "br-", "veth", "virbr", "podman", "cni")  # interfaces that lead to this machine only

_SHORT_HELP: Final = """\
barnraise-coordinator: have volunteers train a language model together.

  barnraise-coordinator new NAME         make a run: a folder with a run file to edit
  barnraise-coordinator data add PATH    give it text
  barnraise-coordinator check            see what it will take
  barnraise-coordinator start            serve it
  barnraise-coordinator invite create    let others in
  barnraise-coordinator --help           everything else"""

_SETTINGS: Final[dict[str, Any]] = {"pretty_exceptions_enable": False, "add_completion": False}
_HELP: Final = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="barnraise-coordinator",
    help="Have volunteers train a language model together.",
    epilog="Try it without any of this: barnraise demo",
    context_settings=_HELP,
    **_SETTINGS,
)
data_app = typer.Typer(name="data", help="The text that the model learns from.", context_settings=_HELP, **_SETTINGS)
invite_app = typer.Typer(name="invite", help="Who may join.", context_settings=_HELP, **_SETTINGS)

ledger_app = typer.Typer(
    name="ledger", invoke_without_command=True, context_settings=_HELP, rich_help_panel="Watch", **_SETTINGS
)

RunOption = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="The run's folder. [this one]", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]


@app.callback()
def _before(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something breaks.")] = False,
) -> None:
    if version:
        import importlib.metadata

        print(f"barnraise-coordinator {importlib.metadata.version('barnraise')}")
        raise typer.Exit


@app.command(rich_help_panel="Prepare")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    at: Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="Where. [./NAME]", show_default=False)] = None,
) -> None:
    """Make a run: a new folder with a commented run file."""
    from coordinator.folder import RunFolder

    RunFolder.create(name, at)
    where = console.printable(str(at or name))
    print(f"Made {where}/run.toml. Edit it, then:\n  cd {where}\n  barnraise-coordinator data add PATH")


@data_app.command("add")
def data_add(
    paths: Annotated[list[Path] | None, typer.Argument(metavar="PATH…", show_default=False)] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json.", show_default=False)
    ] = None,
    train_tokenizer: Annotated[
        int | None,
        typer.Option("--train-tokenizer", metavar="N", help="Make a tokenizer of N entries.", show_default=False),
    ] = None,
    field: Annotated[
        str | None, typer.Option("--field", metavar="NAME", help="Where rows have the text.", show_default=False)
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over bad documents.")] = False,
    lossy: Annotated[bool, typer.Option("--lossy", help="Replace bytes that are not UTF-8.")] = False,
    run: RunOption = None,
) -> None:
    """Read text files, jsonl(.gz/.zst) and parquet; what was added before is replaced.

    Example: barnraise-coordinator data add corpus/*.jsonl.zst notes/
    """
    if not paths:
        raise Refused(Code.USAGE, "data add needs a file or a folder", fix="Run: barnraise-coordinator data add PATH")
    if tokenizer is not None and train_tokenizer is not None:
        what = "--tokenizer and --train-tokenizer exclude each other"
        raise Refused(Code.USAGE, what, fix="Give one of them.")
    folder, spec = _run(run)
    from coordinator import ingest
    from protocol import canonical

    with _store(folder) as store:
        _refuse_published(store)
        with folder.lock():
            _refuse_published(store)  # whoever had the lock may have started the run
            blobs = folder.open_blobs()
            chosen = _tokenizer(folder, spec, paths, tokenizer, train_tokenizer, field=field, lossy=lossy)
            with _progress() as show:
                corpus = ingest.ingest(
                    paths,
                    store=blobs,
                    work=folder.runtime,
                    tokenizer=chosen,
                    context=spec.data.context,
                    heldout=spec.data.heldout,
                    batch_sequences=spec.train.batch_sequences,
                    seed=spec.run.seed,
                    field=field,
                    skip_bad=skip_bad,
                    lossy=lossy,
                    on_progress=show,
                )
            store.set("corpus", canonical.to_bytes(corpus))
            kept = {ref.digest for ref in (*corpus.shards, corpus.heldout)}
            kept |= {corpus.tokenizer.digest} if corpus.tokenizer else set()
            for digest in blobs.digests():
                if digest not in kept:
                    blobs.delete(digest)
    print(_rows(_corpus_rows(corpus)))


@data_app.command("show")
def data_show(run: RunOption = None, as_json: JsonOption = False) -> None:
    """What was added."""
    folder, _ = _run(run)
    with _store(folder) as store:
        corpus = folder.corpus(store)
    print(_json(_corpus_facts(corpus)) if as_json else _rows(_corpus_rows(corpus)))


@app.command(rich_help_panel="Prepare")
def check(run: RunOption = None, as_json: JsonOption = False) -> int:
    """Read run file, data and model, and say what the run will take."""
    folder, spec = _run(run)
    facts, problems, notes = _checked(folder, spec)
    if as_json:
        listed = [{"code": p.reason.code, "what": p.what, "fix": p.fix} for p in problems]
        print(_json({**facts, "problems": listed, "notes": notes}))
    else:
        print(_rows(_plan_rows(facts)))
        for note in notes:
            print(f"! {note}")
        for problem in problems:
            console.complain(f"✗ {console.printable(str(problem))}\n  Fix: {console.printable(problem.fix)}")
        if not problems:
            print("✓ Ready. Serve it with: barnraise-coordinator start")
    return problems[0].reason.exit.value if problems else Exit.OK.value


@app.command(rich_help_panel="Serve")
def start(
    run: RunOption = None,
    json_log: Annotated[bool, typer.Option("--json-log", help="One JSON object a line on stderr.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Serve the run until Ctrl-C; started again, it goes on where it was."""
    folder, spec = _run(run)
    _log(as_json=json_log)
    with _store(folder) as store:
        folder.corpus(store)  # what is missing is said before seconds go into loading
    with console.crash_log(folder.logs / "crash.log"):
        return asyncio.run(_serve(folder, spec, as_json=as_json, named=run))


@invite_app.command("create")
def invite_create(
    uses: Annotated[int, typer.Option("--uses", metavar="N", min=1, max=65535, help="How many nodes may use it.")] = 1,
    expires: Annotated[str, typer.Option("--expires", metavar="TIME", help="How long it is good.")] = "7d",
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="For you: who it is for.")] = "",
    addresses: Annotated[
        list[str] | None, typer.Option("--address", metavar="HOST:PORT", help="Where nodes reach you.")
    ] = None,
    run: RunOption = None,
) -> None:
    """Print an invite, one line, on stdout. Works beside a running coordinator.

    Example: barnraise-coordinator invite create --uses 50 --expires 7d > invite.txt
    """
    seconds = console.parse_duration(expires)
    if len(note) > 120 or not note.isprintable():
        raise Refused(Code.USAGE, "--note is one line of at most 120 characters")
    folder, spec = _run(run)
    from protocol import invite

    with _store(folder) as store:
        reached = tuple(addresses or ()) or spec.coordinator.addresses or (_listening(spec, store),)
        expires_ms = time.time_ns() // 1_000_000 + int(seconds * 1000)
        token = secrets.token_bytes(16)
        issued = invite.issue(
            folder.key(),
            addresses=_reachable(reached),
            fingerprint=folder.fingerprint(),
            name=spec.run.name,
            token=token,
            uses=uses,
            expires_ms=expires_ms,
        )
        store.add_invite(token.hex(), uses=uses, expires_ms=expires_ms, note=note)
    nodes = "one node" if uses == 1 else f"{uses:,} nodes"
    console.complain(
        f"Good for {nodes} until {_when(expires_ms)}; it leads to {', '.join(issued.addresses)}.\n"
        f"They run: barnraise join INVITE"
    )
    print(invite.encode(issued))


@invite_app.command("list")
def invite_list(run: RunOption = None, as_json: JsonOption = False) -> None:
    """The invites that were made."""
    folder, _ = _run(run)
    with _store(folder) as store:
        found = store.invites()
    if as_json:
        print(_json([dict(vars(each)) for each in found]))
        return
    now_ms = time.time_ns() // 1_000_000
    rows = []
    for each in found:
        state = "revoked" if each.revoked else "expired" if each.expires_ms <= now_ms else "open"
        state = "used up" if state == "open" and each.used >= each.uses else state
        used = f"{each.used:,} of {each.uses:,}"
        rows.append((each.token_id[:SHORT_ID], state, used, _when(each.expires_ms), console.printable(each.note)))
    print(_table(("ID", "STATE", "USED", "EXPIRES", "NOTE"), rows) if rows else "No invites yet.")


@invite_app.command("revoke")
def invite_revoke(
    which: Annotated[str, typer.Argument(metavar="ID", help="As in `invite list`, or the invite.", show_default=False)],
    run: RunOption = None,
) -> None:
    """Take an invite back; nodes that have joined with it stay."""
    folder, _ = _run(run)
    token = which.strip().lower()
    if not token.isalnum():
        from protocol import invite

        token = invite.decode(which).token
    with _store(folder) as store:
        fitting = [each.token_id for each in store.invites() if each.token_id.startswith(token)]
        if len(fitting) != 1:
            what = f"{len(fitting) or 'no'} invites begin with {console.printable(token[:40])}"
            raise Refused(Code.INVITE_UNKNOWN, what, fix="See them with: barnraise-coordinator invite list")
        store.revoke_invite(fitting[0])
    print(f"Took back invite {fitting[0][:SHORT_ID]}.")


@app.command(rich_help_panel="Watch")
def runs(
    path: Annotated[Path | None, typer.Argument(metavar="PATH", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """The runs in this folder and below, and how far they are."""
    above = (path or Path()).absolute()
    try:
        next(above.iterdir(), None)
    except OSError as error:
        raise Refused(Code.RUN_MISSING, f"{above} cannot be read: {error.strerror}", fix="Name a folder.") from None
    found = [_run_facts(folder) for folder in _run_folders(above, RUNS_DEPTH)]
    if as_json:
        print(_json(found))
        return
    rows = [
        (
            console.printable(each["name"]),
            console.printable(each["state"]),
            f"{each['round']:,}" + (f" of {each['rounds']:,}" if each["rounds"] else ""),
            f"{each['nodes']:,}",
            _loss(each["heldout_loss"]),
            console.printable(os.path.relpath(each["path"])),
        )
        for each in found
    ]
    print(_table(("NAME", "STATE", "ROUND", "NODES", "LOSS", "FOLDER"), rows) if rows else "No runs here.")


@app.command(rich_help_panel="Watch")
def peers(run: RunOption = None, as_json: JsonOption = False) -> None:
    """The nodes that were admitted, and what they are credited with."""
    folder, _ = _run(run)
    with _store(folder) as store:
        found = store.nodes()
    if as_json:
        keys = ("name", "node", "peer", "credit_tokens", "admitted_ms", "banned")
        print(_json([{key: getattr(each, key) for key in keys} for each in found]))
        return
    rows = [
        (
            console.printable(each.name),
            each.node[:SHORT_ID],
            console.number_text(each.credit_tokens),
            _when(each.admitted_ms),
            "yes" if each.banned else "",
        )
        for each in found
    ]
    print(_table(("NAME", "NODE", "TOKENS", "ADMITTED", "BANNED"), rows) if rows else "No nodes yet.")


@ledger_app.callback()
def ledger(context: typer.Context, run: RunOption = None, as_json: JsonOption = False) -> None:
    """Who contributed what, as the certified records say. `ledger verify` checks every row."""
    context.obj = run
    if context.invoked_subcommand is not None:
        return
    folder, _ = _run(run)
    from coordinator.core.ledger import Wrong
    from coordinator.ledger import read

    try:
        books = read(folder)
    except Wrong as wrong:
        raise Refused(Code.LEDGER, str(wrong)) from None
    if as_json:
        print(_json(_ledger_facts(books)))
    else:
        print(_ledger_text(books))


@ledger_app.command("verify")
def ledger_verify(
    context: typer.Context,
    deep: Annotated[bool, typer.Option("--deep", help="Read the archive again too, and fold every record.")] = False,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> int:
    """Recompute every row from the log, and name the first that is wrong (exit code 4). Works beside a coordinator."""
    folder, _ = _run(run or context.obj)
    from coordinator.ledger import verify

    verdict = verify(folder, deep=deep)
    if as_json:
        finding = None if verdict.finding is None else dict(vars(verdict.finding))
        print(_json({"ok": finding is None, **vars(verdict), "finding": finding}))
        return Exit.OK.value if finding is None else Exit.INTEGRITY.value
    if verdict.finding is not None:
        raise Refused(Code.LEDGER, str(verdict.finding))
    print(_verdict_text(verdict))
    return Exit.OK.value


@app.command(rich_help_panel="Serve")
def rollback(
    to: Annotated[int, typer.Option("--to", metavar="ROUND", min=0, help="How many rounds stay.", show_default=False)],
    folder_named: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="The run's folder. [this one]", show_default=False)
    ] = None,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="One line; volunteers read it.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> int:
    """Go back to the state after an earlier round; every node follows.

    Rounds after it are undone: their data is trained on again, credit for them stays. With --to at the newest round
    nothing is undone and the run gets a new roster: the way out when most rostered nodes are gone for good.

    Example: barnraise-coordinator rollback --to 40 --reason "learning rate too high"
    """
    from protocol.limits import REASON_CHARACTERS_MAX

    if folder_named is not None and run is not None and folder_named.absolute() != run.absolute():
        raise Refused(Code.USAGE, "two folders were named", fix="Name the run's folder once.")
    if len(reason) > REASON_CHARACTERS_MAX or not reason.isprintable():
        raise Refused(Code.USAGE, f"--reason is one line of at most {REASON_CHARACTERS_MAX} characters")
    folder, _ = _run(folder_named or run)
    with _store(folder) as store:
        facts = _rollback_facts(folder, store, to)
        console.complain(_rollback_text(facts))
        if not yes and not _agreed("Go back?" if facts["undone_rounds"] else "Begin a new roster?"):
            console.complain("Nothing was changed.")
            return Exit.INTERRUPTED.value
        order = _ordered(folder, store, to, reason or "ordered by the researcher")
    facts |= {"order": order.order_id, "state": order.state, "answer": order.answer}
    refusal = _unanswered(folder, order)
    if as_json:
        print(_json(facts))
        return Exit.OK.value if refusal is None else refusal.reason.exit.value
    if refusal is not None:
        raise refusal
    waits = "No coordinator serves this run at the moment; it goes back at the next barnraise-coordinator start."
    print(f"✓ {console.printable(order.answer)}" if order.state == "done" else waits)
    return Exit.OK.value


@app.command(rich_help_panel="Take the result")
def export(
    to: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    round_number: Annotated[
        int | None, typer.Option("--round", metavar="R", min=0, help="After so many rounds. [all]", show_default=False)
    ] = None,
    run: RunOption = None,
) -> None:
    """Write the model as a directory that Hugging Face transformers loads.

    Example: barnraise-coordinator export ./model
    """
    folder, spec = _run(run)
    with _store(folder) as store:
        done, digest = _export(folder, spec, store, to.absolute(), round_number)
    where = console.printable(str(to))
    print(f"Wrote {where}: the model after {done:,} rounds, state {digest[:16]}.")
    print(f'  AutoModelForCausalLM.from_pretrained("{where}")')


app.add_typer(data_app, rich_help_panel="Prepare")
app.add_typer(invite_app, rich_help_panel="Serve")
app.add_typer(ledger_app, rich_help_panel="Watch")


def main() -> NoReturn:
    raise SystemExit(console.main(app, program="barnraise-coordinator", short_help=_SHORT_HELP))


def _run(given: Path | None) -> tuple[RunFolder, RunSpec]:
    from coordinator.folder import RunFolder

    folder = RunFolder.find(given)
    return folder, folder.spec()


@contextmanager
def _store(folder: RunFolder) -> Iterator[Store]:
    store = folder.open_store()
    try:
        yield store
    finally:
        store.close()


# data


def _refuse_published(store: Store) -> None:
    if store.get("manifest") is not None:
        raise Refused(Code.DATA_FIXED, "the run was started: its data is what nodes were promised, and stays")


def _tokenizer(
    folder: RunFolder,
    spec: RunSpec,
    paths: Sequence[Path],
    file: Path | None,
    entries: int | None,
    *,
    field: str | None,
    lossy: bool,
) -> Tokenizer:
    """The command line's, or the run file's, whose path is relative to it."""
    from coordinator import ingest, tokenizer

    if entries is not None:
        console.complain(f"Making a tokenizer of {entries:,} entries …")
        return tokenizer.train_tokenizer(ingest.sample(paths, field=field, lossy=lossy), entries=entries)
    if file is None and spec.data.tokenizer == "bytes":
        return tokenizer.byte_tokenizer()
    return tokenizer.load_tokenizer(file or folder.path / spec.data.tokenizer)


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None] | None]:
    """A bar on stderr for a person, nothing for a script."""
    if not (sys.stderr is not None and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading")

        def show(now: Progress) -> None:
            done = f"{now.documents:,} documents, {console.number_text(now.tokens)} tokens"
            bar.update(task, total=now.bytes_total, completed=now.bytes_done, description=done)

        yield show


def _corpus_facts(corpus: Corpus) -> dict[str, Any]:
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


def _corpus_rows(corpus: Corpus) -> list[tuple[str, str]]:
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


# check


def _checked(folder: RunFolder, spec: RunSpec) -> tuple[dict[str, Any], list[Refused], list[str]]:
    """What is known of the run, everything that keeps it from starting, and what a person may want to change."""
    from coordinator import folder as parts
    from protocol.runspec import RunSpec

    facts: dict[str, Any] = {"name": spec.run.name, "architecture": spec.model.architecture, "codec": spec.update.codec}
    problems: list[Refused] = []
    notes: list[str] = []
    corpus: Corpus | None = None
    with _store(folder) as store, _collecting(problems):
        signed = folder.manifest(store)
        facts["started"] = signed is not None
        if signed is not None:
            with _collecting(problems):
                parts.check_unchanged(spec, RunSpec.from_json(signed.manifest.spec))
        corpus = folder.corpus(store)
        facts["data"] = _corpus_facts(corpus)
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


def _plan_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
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
            (
                "memory",
                f"a node's trainer takes {size(plan['memory_trainer_bytes'])} and its activations,"
                f" its other processes {size(plan['memory_helpers_bytes'])}",
            ),
        ]
    if (data := facts.get("data")) is not None:
        rows.append(("data", f"{data['tokens']:,} tokens in {data['sequences']:,} sequences of {data['context']}"))
        rows.append(("held out", f"{data['heldout_tokens']:,} tokens"))
    if plan is not None:
        planned = plan["tokens_planned"]
        passes = f", {plan['passes']:.2f} times the data" if plan["passes"] is not None else ""
        rows.append(("planned", "without end" if planned is None else f"{planned:,} tokens{passes}"))
    return rows


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


# start


class Stopper:
    """Set once when the researcher asks to stop. Asked again, the process ends at once."""

    def __init__(self) -> None:
        self.polite = asyncio.Event()

    def ask(self) -> None:
        if self.polite.is_set():
            os._exit(Exit.INTERRUPTED.value)  # the kernel ends our children with us
        self.polite.set()
        import structlog

        structlog.get_logger().info("Stopping; Ctrl-C again stops now")


async def _serve(folder: RunFolder, spec: RunSpec, *, as_json: bool, named: Path | None) -> int:
    stopper = Stopper()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stopper.ask)
    from coordinator.engine import run

    def ready(ports: Mapping[str, int]) -> None:
        print(_json({"run": spec.run.name, **ports}) if as_json else _rows(_ready_rows(spec, ports, named)), flush=True)

    return await run(folder, stopper=stopper, on_ready=ready)


def _ready_rows(spec: RunSpec, ports: Mapping[str, int], named: Path | None) -> list[tuple[str, str]]:
    from protocol import address

    def at(text: str, port: int) -> Address:
        found = address.parse(text)
        assert found is not None
        return address.Address(found.host, port)

    page = at(spec.coordinator.http, ports["http"])
    host = page.host if _spelled(page.host) not in ("0.0.0.0", "::") else "127.0.0.1"  # noqa: S104
    elsewhere = f" --run {console.printable(str(named))}" if named is not None else ""
    return [
        ("run", f"{spec.run.name} is up; Ctrl-C stops it"),
        ("nodes", f"{at(spec.coordinator.listen, ports['grpc'])} and {at(spec.coordinator.p2p, ports['p2p'])}"),
        ("dashboard", f"http://{address.Address(host, page.port)}"),
        ("invite", f"barnraise-coordinator invite create --uses 50 --expires 7d{elsewhere}"),
    ]


def _spelled(host: str) -> str:
    """The address in one spelling; a name as it is."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def _log(*, as_json: bool) -> None:
    """Sentences on stderr, each with its time; or JSON for a machine."""
    import structlog

    if as_json:
        stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
        form: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
        form = [structlog.processors.format_exc_info, _sentence]
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, stamp, *form],
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )


def _sentence(_logger: object, level: str, event: dict[str, Any]) -> str:
    trace = event.pop("exception", None)
    words = [event.pop("timestamp"), "" if level == "info" else f"{level}:", str(event.pop("event"))]
    event.pop("level", None)
    line = console.printable(" ".join(filter(None, [*words, *(f"{key}={value}" for key, value in event.items())])))
    return line if trace is None else f"{line}\n{trace}"


# invites


def _listening(spec: RunSpec, store: Store) -> str:
    """Where this machine can be reached, as far as it knows by itself."""
    from protocol import address

    listen = address.parse(spec.coordinator.listen)
    assert listen is not None
    port = listen.port
    if port == 0:
        port = json.loads(store.get("ports") or b"{}").get("grpc", 0)
    if port == 0:
        what = "[coordinator] listen has port 0, so the port is known once the coordinator runs"
        raise Refused(Code.SPEC_VALUE, what, fix="Run barnraise-coordinator start first, or give --address HOST:PORT.")
    host = listen.host
    if _spelled(host) in ("0.0.0.0", "::"):  # noqa: S104
        own = _own_address()
        if own is None:
            _warn("This machine has no address but its own loopback: only nodes on it can use this invite.")
        elif not ipaddress.ip_address(own).is_global:
            _warn(f"{own} is an address inside your own network; for others, name a public one with --address.")
        host = own or "127.0.0.1"
    elif _spelled(host).startswith("127.") or _spelled(host) == "::1":
        _warn("The coordinator listens on loopback: only nodes on this machine can use this invite.")
    return str(address.Address(host, port))


def _warn(text: str) -> None:
    console.complain(f"Warning: {text}")


def _own_address() -> str | None:
    """The address that others most likely reach: public before private, real interfaces before bridges."""
    import socket

    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = []
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if name not in up or entry.family not in (socket.AF_INET, socket.AF_INET6) or "%" in entry.address:
                continue
            own = ipaddress.ip_address(entry.address)
            if not (own.is_loopback or own.is_link_local or own.is_multicast or own.is_unspecified):
                found.append((name.startswith(_VIRTUAL), not own.is_global, own.version, name, str(own)))
    return min(found)[-1] if found else None


def _reachable(addresses: Iterable[str]) -> tuple[str, ...]:
    from protocol import address
    from protocol.limits import ADDRESSES_MAX

    checked = []
    for text in addresses:
        found = address.parse(text)
        if found is None or found.unspecified:
            what = f"{console.printable(text[:80])} is not an address that others can connect to"
            raise Refused(Code.USAGE, what, fix="Write host:port, as in --address train.example.org:49300")
        checked.append(str(found))
    if len(checked) > ADDRESSES_MAX:
        raise Refused(Code.USAGE, f"an invite names at most {ADDRESSES_MAX} addresses, not {len(checked)}")
    return tuple(checked)


# runs


def _run_folders(path: Path, depth: int) -> Iterator[RunFolder]:
    """This folder and those below it that hold a run file."""
    from coordinator.folder import RunFolder

    folder = RunFolder(path)
    if folder.exists:
        yield folder
        return
    if not depth:
        return
    try:
        below = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink())
    except OSError:
        return
    for entry in below:
        if not entry.name.startswith("."):
            yield from _run_folders(entry, depth - 1)


def _run_facts(folder: RunFolder) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": folder.path.name, "path": str(folder.path), "state": "new"}
    facts |= {"round": 0, "rounds": 0, "nodes": 0, "heldout_loss": None, "train_loss": None, "tokens": 0}
    try:
        spec = folder.spec()
        facts |= {"name": spec.run.name, "rounds": spec.run.rounds}
        if not folder.database.exists():
            return facts
        with _store(folder) as store:
            measured = store.history()
            heldout = [row.heldout for row in measured if row.heldout is not None and math.isfinite(row.heldout)]
            facts["round"] = store.entry_count
            facts["nodes"] = len(store.nodes())
            facts["heldout_loss"] = heldout[-1] if heldout else None
            if measured:
                train = measured[-1].train  # what nodes said of themselves
                facts["train_loss"] = train if train is not None and math.isfinite(train) else None
                facts["tokens"] = measured[-1].tokens
            facts["state"] = _run_state(folder, spec, store)
    except Refused as refused:
        facts["state"] = f"broken: {refused}"
    return facts


def _run_state(folder: RunFolder, spec: RunSpec, store: Store) -> str:
    if folder.busy:
        return "running"
    if store.get("manifest") is None:
        return "new" if store.get("corpus") is None else "ready"
    return "finished" if 0 < spec.run.rounds <= store.entry_count else "stopped"


# ledger


def _ledger_facts(books: Books) -> dict[str, Any]:
    from coordinator import view
    from coordinator.core.ledger import balances

    nodes = [dict(vars(each)) for each in balances(books)]
    gone = [each.rollback for _, each in sorted(books.rollbacks.items())]
    return {
        "nodes": nodes,
        "tokens": sum(each["tokens"] for each in nodes),
        "undone_tokens": sum(each["undone_tokens"] for each in nodes),
        "records": len(books.entries),
        "undone_records": sum(1 for row in books.entries if row.undone_by is not None),
        "rollbacks": [view.rollback(each) for each in gone],
    }


def _ledger_text(books: Books) -> str:
    facts = _ledger_facts(books)
    rows = [
        (
            console.printable(each["name"]),
            console.printable(each["node"][:SHORT_ID]),
            f"{each['tokens']:,}",
            f"{each['undone_tokens']:,}" if each["undone_tokens"] else "",
            f"{each['rounds']:,}",
        )
        for each in facts["nodes"]
    ]
    if not rows:
        return "No nodes yet."
    total = f"{facts['tokens']:,} tokens of {_counted(len(rows), 'node')} in {_counted(facts['records'], 'record')}"
    if facts["undone_records"]:
        undone = f"{_counted(facts['undone_records'], 'record')} and {facts['undone_tokens']:,} tokens"
        total += f"; {_counted(len(facts['rollbacks']), 'rollback')} undid {undone} of them, credited all the same"
    return f"{_table(('NAME', 'NODE', 'TOKENS', 'UNDONE', 'ROUNDS'), rows)}\n{total}."


def _verdict_text(verdict: Verdict) -> str:
    records = _counted(verdict.records, "record")
    if verdict.rollbacks:
        records += f" and {verdict.undone:,} that {_counted(verdict.rollbacks, 'rollback')} undid"
    said = (
        f"✓ Every row is what the log says: {records}, {_counted(verdict.tokens, 'token')} in"
        f" {_counted(verdict.sequences, 'sequence')} of data that each count once, {_counted(verdict.nodes, 'node')},"
        f" {_counted(verdict.rosters, 'roster')}, {_counted(verdict.signatures, 'signature')},"
        f" {_counted(verdict.bases, 'base checkpoint')}, {_counted(verdict.evaluations, 'evaluation')}."
    )
    if verdict.folded is not None:
        said += f"\n✓ The archive folds to the same states: {_counted(verdict.folded, 'record')}"
        said += f"; {_counted(verdict.waiting, 'record')} wait for parts." if verdict.waiting else "."
    return said


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# rollback


def _rollback_facts(folder: RunFolder, store: Store, to: int) -> dict[str, Any]:
    """What going back to this round means, as the database has it now."""
    if store.get("manifest") is None:
        what = f"the run in {folder.path} was never started, so it has no log"
        raise Refused(Code.RUN_MISSING, what, fix="Run: barnraise-coordinator start")
    head = store.entry_count
    if to > head:
        raise Refused(Code.RUN_MISSING, f"round {to}, the log has 0 to {head}", fix="Choose one of them.")
    undone = [contribution for entry in store.entries(to) for contribution in entry.record.contributions]
    measured = [row for row in store.history() if row.heldout is not None and math.isfinite(row.heldout)]
    return {
        "to": to,
        "head": head,
        "undone_rounds": head - to,
        "undone_tokens": sum(each.tokens for each in undone),
        "heldout": _measured(measured, to),
        "heldout_now": _measured(measured, head),
    }


def _measured(rows: Sequence[Evaluation], to: int) -> dict[str, Any] | None:
    """The held-out loss at this round, or the nearest before it."""
    found = next((row for row in reversed(rows) if row.round <= to), None)
    return None if found is None else {"round": found.round, "loss": found.heldout}


def _rollback_text(facts: Mapping[str, Any]) -> str:
    to, head = facts["to"], facts["head"]
    if to == head:
        return (
            f"Round {to:,} is the newest: nothing is undone. The run gets a new roster of the nodes that are here,\n"
            "and goes on with their majority; what others may have certified meanwhile no longer counts."
        )
    lines = [
        f"Going back to round {to:,} of {head:,} undoes {_counted(facts['undone_rounds'], 'round')} and"
        f" {facts['undone_tokens']:,} tokens of training."
    ]
    then, now = facts["heldout"], facts["heldout_now"]
    if then is not None:
        line = f"Held-out loss was {then['loss']:.4f} after {_counted(then['round'], 'round')}"
        later = now is not None and now["round"] > then["round"]
        lines.append(f"{line}; it is {now['loss']:.4f} after {now['round']:,}." if later else f"{line}.")
    lines.append(
        "Volunteers' nodes follow by themselves: they take the earlier state, drop what they trained since, and go on.\n"
        "Their credit stays; the data of the undone rounds is trained on again."
    )
    return "\n".join(lines)


def _agreed(question: str) -> bool:
    """Asks only a person: without a terminal on both ends the command itself is the consent."""
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    agreed: bool = typer.confirm(question, err=True)
    return agreed


def _ordered(folder: RunFolder, store: Store, to: int, reason: str) -> Order:
    """Place the order, and wait for the answer of a coordinator that runs."""
    from coordinator.orders import ROLLBACK, RollbackOrder

    order_id = store.add_order(ROLLBACK, RollbackOrder(to, reason).to_bytes())
    until = time.monotonic() + ANSWER_SECONDS
    while (order := store.order(order_id)).state == "open" and folder.busy and time.monotonic() < until:
        time.sleep(ASK_SECONDS)
    return order


def _unanswered(folder: RunFolder, order: Order) -> Refused | None:
    """Why the order was not carried out; none when it was, or will be at the next start."""
    if order.state == "refused":
        return Refused(Code.ORDER_REFUSED, order.answer)
    if order.state == "open" and folder.busy:
        what = f"the coordinator has not answered for {ANSWER_SECONDS:.0f} s"
        return Refused(Code.UNREACHABLE, what, fix="See its log. The order waits, and is carried out when it can be.")
    return None


# export


def _export(folder: RunFolder, spec: RunSpec, store: Store, to: Path, round_number: int | None) -> tuple[int, str]:
    signed = folder.manifest(store)
    if signed is None:
        what = f"the run in {folder.path} was never started, so it has no model"
        raise Refused(Code.RUN_MISSING, what, fix="Run: barnraise-coordinator start")
    from coordinator.archive import rebuild
    from coordinator.export import Contributor, Facts
    from coordinator.export import export as write
    from coordinator.tokenizer import Tokenizer, byte_tokenizer

    manifest, blobs, corpus = signed.manifest, folder.open_blobs(), folder.corpus(store)
    state = rebuild(store, blobs, manifest, round_number)
    digest = state.digest()
    credit: dict[Any, int] = {}
    for entry in store.entries(0, state.round):
        for each in entry.record.contributions:
            credit[each.node] = credit.get(each.node, 0) + each.tokens
    names = store.names()
    ranked = sorted(credit.items(), key=lambda item: (-item[1], item[0]))
    measured = {row.round: row.heldout for row in store.history()}
    write(
        to,
        model_config=manifest.model_config,
        parameters=state.params,
        tokenizer=Tokenizer(blobs.read(manifest.tokenizer.digest)) if manifest.tokenizer else byte_tokenizer(),
        context=manifest.context,
        facts=Facts(
            title=spec.run.title or manifest.name,
            run=manifest.run,
            round=state.round,
            state=digest,
            tokens=sum(credit.values()),
            corpus_documents=corpus.documents,
            corpus_tokens=corpus.tokens,
            heldout_loss=measured.get(state.round),
            contributors=tuple(Contributor(names.get(node, node[:SHORT_ID]), tokens) for node, tokens in ranked),
            license=spec.run.license,
            command=f"barnraise-coordinator export {to.name} --round {state.round}",
        ),
    )
    return state.round, digest


# output


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{title:<11}{text}" for title, text in rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows))


def _when(ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ms / 1000))


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
