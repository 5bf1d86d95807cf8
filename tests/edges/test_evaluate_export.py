"""The evaluator process and the exported directory, each against transformers itself."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coordinator.evaluate import Evaluation
from coordinator.evaluation import Evaluator
from coordinator.export import MARKER, Contributor, Facts, export
from coordinator.tokenizer import byte_tokenizer, train_tokenizer
from protocol import model
from protocol.errors import Code, Refused

torch.set_num_threads(1)

CONTEXT = 32
TEXT = "naïve Ωmega 日本 🙂\n  indented\tand <|tagged|> text, twice: \r\n\u2028"
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}
MODELS = {
    "llama": ("llama", LLAMA),
    "llama with tied embeddings": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2),
}
FACTS = Facts(
    title="Tiny <script>alert(1)</script> | *model*",
    run="abc.demo",
    round=7,
    state="0" * 64,
    tokens=1234567,
    corpus_documents=10,
    corpus_tokens=2000,
    heldout_loss=5.5,
    contributors=(Contributor("ann](http://evil) `x`", 1000), Contributor("bob\n# heading", 24)),
    license="apache-2.0",
    command="barnraise-coordinator export ./tiny_model",
)


@pytest.fixture(params=MODELS)
def built(request):
    return build(*MODELS[request.param])


def build(architecture="llama", values=LLAMA, tokenizer=None):
    """(config, parameters) with weights large enough that a wrong one would show."""
    vocabulary = (tokenizer or byte_tokenizer()).vocabulary
    config = model.model_config(architecture, values, vocabulary=vocabulary, context=CONTEXT)
    return config, model.initial_vector(config, seed=3) * np.float32(3)


@pytest.fixture
def heldout(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 257, CONTEXT * 10 + 5).astype("<u2")
    path = tmp_path / "heldout"
    tokens.tofile(path)
    return path


def order(tmp_path, heldout, config, parameters):
    vector = tmp_path / "vector"
    parameters.tofile(vector)
    return {
        "vector": vector,
        "model_config": config,
        "heldout": heldout,
        "token_bytes": 2,
        "context": CONTEXT,
        "sequences": 8,
        "tokenizer": None,
        "threads": 1,
    }


def start(tmp_path, heldout, config, parameters):
    return Evaluator.start(
        folder=tmp_path,
        model_config=config,
        parameters=len(parameters),
        heldout=heldout,
        token_bytes=2,
        context=CONTEXT,
        sequences=8,
        tokenizer=None,
    )


def write(folder, config, parameters, tokenizer=None, facts=FACTS):
    export(
        folder,
        model_config=config,
        parameters=parameters,
        tokenizer=tokenizer or byte_tokenizer(),
        context=CONTEXT,
        facts=facts,
    )
    return folder


def test_the_exported_model_has_the_loss_that_the_evaluator_measured(tmp_path, heldout, built):
    config, parameters = built
    measured = Evaluation(order(tmp_path, heldout, config, parameters)).loss()
    loaded = AutoModelForCausalLM.from_pretrained(write(tmp_path / "out", config, parameters))
    tokens = torch.from_numpy(np.fromfile(heldout, "<u2")[: 8 * CONTEXT + 1].astype(np.int64))
    with torch.inference_mode():
        logits = loaded(input_ids=tokens[:-1].reshape(8, CONTEXT)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:]).item()
    assert loss == pytest.approx(measured, abs=1e-5)
    again = np.empty_like(parameters)
    model.flatten(loaded, again)
    assert np.array_equal(again, parameters)


def test_sequences_are_measured_a_few_at_a_time_with_the_same_result(tmp_path, heldout, monkeypatch):
    evaluation = Evaluation(order(tmp_path, heldout, *build()))
    at_once = evaluation.loss()
    monkeypatch.setattr("coordinator.evaluate.LOGITS_MAX", 3 * CONTEXT * 257)
    assert evaluation.loss() == pytest.approx(at_once, abs=1e-6)


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_transformers_loads_tokenizer_and_model_and_generates(tmp_path, kind):
    tokenizer = byte_tokenizer() if kind == "bytes" else train_tokenizer([TEXT * 20], entries=280)
    config, parameters = build(tokenizer=tokenizer)
    folder = write(tmp_path / "out", config, parameters, tokenizer)
    loaded, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = words(TEXT)["input_ids"]
    assert ids == tokenizer.encode(TEXT)
    assert words.decode(ids) == TEXT
    assert words.eos_token_id == tokenizer.end == loaded.generation_config.eos_token_id == loaded.config.eos_token_id
    assert words.model_max_length == CONTEXT
    torch.manual_seed(0)
    prompt = words("na", return_tensors="pt")
    written = loaded.generate(**prompt)
    assert prompt["input_ids"].shape[1] < written.shape[1] <= CONTEXT
    assert loaded.generate(max_new_tokens=3).shape[0] == 1, "without a prompt it begins a document"


def test_the_export_holds_what_a_hub_wants_and_a_card_that_strangers_cannot_format(tmp_path):
    folder = write(tmp_path / "out", *build())
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        MARKER,
    }
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and 'license: "apache-2.0"' in card
    for expected in (
        "1,234,567",
        "5.5000 nats per token",
        "10 documents, 2,000 tokens",
        "export ./tiny_model",
        "1,000",
    ):
        assert expected in card
    assert "<script>" not in card and "](http" not in card and "\n# heading" not in card
    assert json.loads((folder / MARKER).read_text(encoding="utf-8"))["facts"]["round"] == 7
    assert not list(tmp_path.glob(".out*")), "scratch was left behind"


def test_an_older_export_is_replaced_and_anyone_elses_files_are_not(tmp_path):
    config, parameters = build()
    folder = tmp_path / "out"
    folder.mkdir()
    write(folder, config, parameters)
    write(folder, config, parameters, facts=replace(FACTS, round=8, heldout_loss=None, contributors=()))
    assert "| rounds | 8 |" in (folder / "README.md").read_text(encoding="utf-8")
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(Refused) as caught:
        write(folder, config, parameters)
    assert caught.value.reason is Code.RUN_EXISTS and "notes.txt" in caught.value.what
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for path in (tmp_path / "file", tmp_path / "link"):
        path.write_text("") if path.name == "file" else path.symlink_to(folder)
        with pytest.raises(Refused):
            write(path, config, parameters)


def test_an_export_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    config, parameters = build()
    folder = write(tmp_path / "out", config, parameters)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("coordinator.export._card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(folder, config, parameters)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_sample_repeats_with_its_seed_and_stays_inside_the_context(tmp_path, heldout):
    sample = Evaluation(order(tmp_path, heldout, *build())).sample
    one = sample("the é", tokens=12, seed=1, temperature=0.8)
    assert one == sample("the é", tokens=12, seed=1, temperature=0.8)
    assert one != sample("the é", tokens=12, seed=2, temperature=0.8)
    greedy = [sample("", tokens=10**9, seed=seed, temperature=0) for seed in (1, 2)]
    assert greedy[0] == greedy[1] and 0 < len(greedy[0]) < CONTEXT
    assert sample("long prompt " * 50, tokens=4, seed=1, temperature=0.8)


def test_a_greedy_sample_is_what_transformers_generates(tmp_path, heldout):
    config, parameters = build()
    sampled = Evaluation(order(tmp_path, heldout, config, parameters)).sample("abc", tokens=12, seed=0, temperature=0)
    loaded = AutoModelForCausalLM.from_pretrained(write(tmp_path / "out", config, parameters))
    prompt = torch.tensor([[256, *b"abc"]])
    mask = torch.ones_like(prompt)
    written = loaded.generate(input_ids=prompt, attention_mask=mask, do_sample=False, max_new_tokens=12)
    assert sampled == byte_tokenizer().decode(written[0, 4:].tolist())


def test_heldout_tokens_outside_the_vocabulary_are_refused(tmp_path):
    path = tmp_path / "heldout"
    np.full(CONTEXT + 1, 300, "<u2").tofile(path)
    with pytest.raises(Refused) as caught:
        Evaluation(order(tmp_path, path, *build()))
    assert caught.value.reason is Code.TOKEN_RANGE
    np.zeros(CONTEXT, "<u2").tofile(path)
    with pytest.raises(Refused) as caught:
        Evaluation(order(tmp_path, path, *build()))
    assert caught.value.reason is Code.DATA_EMPTY


async def test_the_process_answers_what_was_asked_last_until_it_is_killed(tmp_path, heldout, monkeypatch):
    config, parameters = build()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # its owner may not have imported what sets it
    expected = Evaluation(order(tmp_path, heldout, config, parameters)).loss()
    evaluator = await start(tmp_path, heldout, config, parameters)
    try:
        assert psutil.Process(evaluator.pid).nice() >= 10
        assert await evaluator.loss(parameters) == pytest.approx(expected, abs=1e-6)
        broken = parameters.copy()
        broken[-1] = np.nan
        assert await evaluator.loss(broken) is None
        assert await evaluator.sample(np.full_like(parameters, np.inf), "a", tokens=5, seed=1) == ""
        asked = asyncio.create_task(evaluator.sample(parameters, "abc", tokens=20, seed=1))
        await asyncio.sleep(0.01)
        asked.cancel()
        assert await evaluator.loss(parameters) == pytest.approx(expected, abs=1e-6), "that was the cancelled answer"
        os.kill(evaluator.pid, signal.SIGKILL)
        with pytest.raises(Refused) as caught:
            await evaluator.loss(parameters)
        assert caught.value.reason is Code.CHILD_DIED
    finally:
        await evaluator.stop()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["heldout", "vector"]


async def test_a_start_that_is_refused_leaves_nothing(tmp_path, heldout):
    config, parameters = build()
    np.full(CONTEXT + 1, 300, "<u2").tofile(heldout)
    with pytest.raises(Refused) as caught:
        await start(tmp_path, heldout, config, parameters)
    assert caught.value.reason is Code.TOKEN_RANGE
    assert [file.name for file in tmp_path.iterdir()] == ["heldout"], "the shared vector was left behind"
    assert not psutil.Process().children(), "a process was left behind"


def test_the_handle_brings_no_torch_into_its_process():
    loaded = "import coordinator.evaluation, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded]).returncode == 0
