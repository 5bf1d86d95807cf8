"""The researcher's command: every word against a real folder, database and archive; `start` as a real process."""

import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from coordinator import archive, cli, reach
from coordinator.core import leases as data
from coordinator.core.leases import Leases
from coordinator.core.strikes import By, Kind, Mark
from coordinator.folder import RunFolder
from coordinator.orders import JudgeOrder, RollbackOrder
from coordinator.plan import plan
from coordinator.store import Evaluation, StoredNode
from node import trainer, workbench
from protocol import address, console, contribution, identity, invite, p2pd, runspec, tls
from protocol.codec import codec
from protocol.contribution import sign_grant
from protocol.errors import Code, Refused
from protocol.exchange import Packing
from protocol.fold import fold
from protocol.identity import Key, peer_id_of, sign_roster
from protocol.log import VOTE, genesis_head, head_after, next_head, ranges_of, vote_bytes
from protocol.types import (
    Ballot,
    Certificate,
    Contribution,
    DataRange,
    Epoch,
    Fault,
    Grant,
    LogEntry,
    Member,
    Part,
    Pass,
    Record,
    Role,
    Rollback,
    Roster,
    Signature,
    VoteBody,
)

ROOT = Path(__file__).parents[2]
RUN = """\
[run]
name = "tiny"
title = "A tiny run"
rounds = 4
[model.config]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
[data]
context = 16
[train]
batch_sequences = 2
[rounds]
inner_steps = [[2, 1], [1, 3]]
[coordinator]
listen = "127.0.0.1:0"
http = "127.0.0.1:0"
p2p = "127.0.0.1:0"
"""


def call(*words):
    """The exit code of one command line."""
    arguments = [str(word) for word in words]
    return console.main(cli.app, program="barnraise-coordinator", short_help="short help", arguments=arguments)


def write_text(folder, documents=40, seed=0):
    draw = random.Random(seed)
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    folder.mkdir(exist_ok=True)
    for number in range(documents):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=12)) + f" {seed} {number}\n")
    return folder


def make_run(path, text=RUN):
    path.mkdir()
    (path / "run.toml").write_text(text)
    return RunFolder(path)


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def ready(folder, tmp_path, capsys):
    assert call("data", "add", write_text(tmp_path / "text"), "--run", folder.path) == 0
    capsys.readouterr()
    return folder


@pytest.fixture(scope="module")
def published_once(tmp_path_factory):
    at = tmp_path_factory.mktemp("published")
    folder = make_run(at / "run")
    assert call("data", "add", write_text(at / "text"), "--run", folder.path) == 0
    store = folder.open_store()
    folder.publish(store, folder.open_blobs())
    store.close()
    return folder


@pytest.fixture
def published(published_once, tmp_path):
    shutil.copytree(published_once.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture
def store(published):
    store = published.open_store()
    yield store
    store.close()


def admit(store, folder, name, seed, invite=None):
    key = Key.generate()
    peer = peer_id_of(key.public_bytes)
    body = Pass(folder.run_id(), key.public, peer, name, 0, 1 << 50)
    store.save_node(StoredNode(key.public, peer, name, invite, identity.sign_pass(folder.key(), body), 1000 + seed))
    return key.public


def grow(folder, store, rounds):
    """Certified rounds of random updates, as the engine leaves them; answers the states' digests, the first included."""
    manifest, blobs = folder.manifest(store).manifest, folder.open_blobs()
    state, packing = archive.rebuild(store, blobs, manifest), Packing(codec("int4"), codec("int4"))
    outer = archive.outer_of(folder.spec().update)
    nodes = [admit(store, folder, name, index) for index, name in enumerate(("ann", "bob"))]
    shard = store.shards()[0].digest
    head, digests = genesis_head(manifest), [state.digest()]
    for number in range(rounds):
        values = np.random.default_rng(number).standard_normal(manifest.parameters).astype(np.float32) / 100
        data = packing.up.encode(values)
        ref = blobs.put_bytes(data)
        part = Part(0, 0, manifest.parameters, ref.digest, ref.size, nodes[0], tuple(nodes))
        contributions = tuple(
            Contribution(
                node, 32 * (place + 1), (DataRange(0, shard, 4 * number + 2 * place, 4 * number + 2 * place + 2),)
            )
            for place, node in enumerate(nodes)
        )
        record = Record(manifest.run, head.round, head.hash, 0, nodes[0], contributions, (part,), digests[-1])
        head = next_head(record)
        store.append_entry(
            LogEntry(record, Certificate(head.hash, Ballot(0, 0), ())),
            {each.node: each.tokens for each in contributions},
        )
        fold(state, record, {0: data}, packing, outer)
        digests.append(state.digest())
    return digests


# words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "short help"),
        (["dta"], "did you mean data?"),
        (["data", "ad"], "add"),
        (["check", "--jsn"], "did you mean --json?"),
        (["data", "add"], "needs a file or a folder"),
        (["invite", "create", "--uses", "0"], "--uses"),
        (["invite", "create", "--expires", "soon"], "not a time span"),
        (["new"], "NAME"),
    ],
)
def test_a_mistyped_command_line_is_a_sentence_and_exit_code_2(words, says, capsys):
    assert call(*words) == 2
    output = capsys.readouterr()
    assert says in output.err and not output.out and "Traceback" not in output.err


def test_help_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'hivemind', 'pyarrow', 'numpy', 'sqlalchemy', 'grpc'}"
    code = f"import coordinator.cli, sys; sys.exit(' '.join({heavy} & set(sys.modules)) or None)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_new_makes_a_run_file_that_loads_and_never_touches_an_existing_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("new", "tidewater") == 0
    assert RunFolder.find(tmp_path / "tidewater").spec().run.name == "tidewater"
    before = (tmp_path / "tidewater/run.toml").read_bytes()
    assert call("new", "tidewater") == 3 and call("new", "other", "--dir", "tidewater") == 3
    assert (tmp_path / "tidewater/run.toml").read_bytes() == before
    assert call("new", "Not A Name") == 3 and call("new", "../escape") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["tidewater"]
    assert "E-RUN-002" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["check"], ["start"], ["data", "show"], ["invite", "create"], ["peers"], ["export", "x"]]
)
def test_a_folder_without_a_run_file_is_named(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*words) == 3
    assert "E-RUN-001" in capsys.readouterr().err and not list(tmp_path.iterdir()), "something was made there"


def test_a_folder_that_cannot_be_looked_at_is_no_surprise(tmp_path, capsys):
    for path in (tmp_path / ("x" * 5000), tmp_path / "line\nbreak \u202e", "/proc/1/root/secret"):
        assert call("check", "--run", path) == 3 and call("runs", path) == 3
    assert "E-RUN-001" in capsys.readouterr().err


def test_a_misspelt_key_is_named_with_its_place(folder, capsys):
    folder.run_file.write_text(RUN.replace("rounds = 4", "runds = 4"))
    assert call("check", "--run", folder.path) == 3
    error = capsys.readouterr().err
    assert "run.toml:4:1" in error and "did you mean [run] rounds?" in error


def test_what_is_ours_is_closed_to_others(published):
    published.peer_key()
    published.tls()
    assert stat.S_IMODE(published.ours.stat().st_mode) == 0o700
    for path in (*published.keys.iterdir(), published.database):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
    assert {path.name for path in published.keys.iterdir()} == {"coordinator.key", "p2p.key", "tls.key", "tls.crt"}


# data


def test_data_is_added_shown_and_replaced(folder, tmp_path, capsys):
    assert call("data", "add", write_text(tmp_path / "a"), "--run", folder.path) == 0
    said = capsys.readouterr().out
    assert "40" in said and "sequences of 16" in said
    first = set(folder.open_blobs().digests())
    assert call("data", "add", write_text(tmp_path / "b", 30, seed=1), "--run", folder.path) == 0
    capsys.readouterr()
    assert call("data", "show", "--json", "--run", folder.path) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["documents"], shown["vocabulary"], shown["tokenizer"]) == (30, 257, "bytes")
    left = set(folder.open_blobs().digests())
    assert len(left) == shown["shards"] + 1 and not left & first, "the data before was kept"
    assert not list(folder.runtime.iterdir()), "scratch was left behind"


def test_data_that_is_refused_leaves_what_was_there(ready, tmp_path, capsys):
    before = ready.open_blobs().digests()
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    assert call("data", "add", tmp_path / "bad.jsonl", "--run", ready.path) == 3
    error = capsys.readouterr().err
    assert "bad.jsonl:1" in error and "Traceback" not in error
    assert ready.open_blobs().digests() == before
    assert call("data", "show", "--run", ready.path) == 0


def test_a_tokenizer_is_made_or_read_and_not_both(folder, tmp_path, capsys):
    text = write_text(tmp_path / "text", 60)
    assert call("data", "add", text, "--tokenizer", "x", "--train-tokenizer", "300", "--run", folder.path) == 2
    assert call("data", "add", text, "--train-tokenizer", "270", "--run", folder.path) == 0
    store = folder.open_store()
    made = folder.corpus(store)
    store.close()
    assert made.vocabulary == 270 and folder.open_blobs().has(made.tokenizer.digest)
    (folder.path / "mine.json").write_bytes(folder.open_blobs().read(made.tokenizer.digest))
    folder.run_file.write_text(RUN.replace("[data]", '[data]\ntokenizer = "mine.json"'))
    assert call("data", "add", text, "--run", folder.path) == 0
    store = folder.open_store()
    assert folder.corpus(store) == made
    store.close()
    assert call("data", "add", text, "--tokenizer", tmp_path / "none.json", "--run", folder.path) == 3


# check


def test_check_says_what_the_run_will_take(ready, capsys):
    assert call("check", "--json", "--run", ready.path) == 0
    found = json.loads(capsys.readouterr().out)
    parameters = found["plan"]["parameters"]
    assert found["problems"] == [] and not found["started"]
    assert parameters == 257 * 16 * 2 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16
    assert found["plan"]["update_bytes"] == codec("int4").encoded_bytes(parameters)
    assert found["plan"]["tokens_planned"] == (1 + 1 + 3 + 3) * 2 * 16
    assert call("check", "--run", ready.path) == 0
    said = capsys.readouterr().out
    assert f"{parameters:,} parameters" in said and "Ready" in said


@pytest.mark.parametrize("outer", ['"average"', '"nesterov"\nouter_momentum = 0.9'])
def test_check_says_how_much_memory_a_node_will_be_refused_without(ready, capsys, outer):
    ready.run_file.write_text(RUN + f"[update]\nouter = {outer}\n")
    assert call("check", "--json", "--run", ready.path) == 0
    found = json.loads(capsys.readouterr().out)["plan"]
    state, logits = found["parameters"] * trainer.STATE_BYTES, 12 * 257 * 16
    assert found["memory_trainer_bytes"] == state + logits
    held = workbench.HELD_BYTES + workbench.MOMENTUM_BYTES * ("momentum" in outer)
    processes = found["memory_helpers_bytes"] - found["parameters"] * held
    assert 512 << 20 < processes < 1 << 30, "what they take without a model"
    assert call("check", "--run", ready.path) == 0
    trains, helps = (console.size_text(found[f"memory_{which}_bytes"]) for which in ("trainer", "helpers"))
    says = f"memory     a node's trainer takes {trains} and its activations, its other processes {helps}"
    assert says in capsys.readouterr().out


def test_check_names_every_problem(folder, capsys):
    folder.run_file.write_text(RUN.replace("hidden_size = 16", "hidden_sizes = 16"))
    assert call("check", "--json", "--run", folder.path) == 3
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [each["code"] for each in problems] == [Code.DATA_EMPTY.code, Code.MODEL_BAD.code]
    assert "data add" in problems[0]["fix"] and "did you mean hidden_size?" in problems[1]["what"]


def test_check_refuses_data_of_another_context_and_data_that_is_gone(ready, capsys):
    ready.run_file.write_text(RUN.replace("context = 16", "context = 32"))
    assert call("check", "--run", ready.path) == 3
    assert "[data] context = 32, but the data was added with 16" in capsys.readouterr().err
    ready.run_file.write_text(RUN)
    blobs = ready.open_blobs()
    blobs.delete(blobs.digests()[0])
    assert call("check", "--run", ready.path) == Code.BLOB_MISSING.exit.value


def test_a_round_of_a_butterfly_costs_less_than_twice_the_update():
    spec = runspec.parse(RUN.replace('title = "A tiny run"', "min_nodes = 4"))
    found = plan(spec, parameters=1_000_000, vocabulary=257, sequences=1000)
    assert found.update_bytes == codec("int4").encoded_bytes(1_000_000)
    assert found.round_bytes == 2 * 3 * found.update_bytes // 4 < found.round_bytes_many == 2 * found.update_bytes
    assert (found.sequences_first, found.sequences_last) == (2, 6)
    assert found.tokens_planned == 8 * 2 * 16 * 4 and found.passes == found.tokens_planned / 16000
    endless = runspec.parse(RUN.replace("rounds = 4", "rounds = 0"))
    assert plan(endless, parameters=1, vocabulary=257, sequences=1).tokens_planned is None


def test_check_shows_what_each_codec_sends_and_what_a_cap_on_uploads_costs(ready, capsys):
    ready.run_file.write_text(RUN.replace("[rounds]", "[rounds]\nupload_megabytes_per_hour = 0.01"))
    assert call("check", "--json", "--run", ready.path) == 0
    found = json.loads(capsys.readouterr().out)["plan"]
    assert found["round_seconds_min"] == pytest.approx(found["round_bytes"] * 3600 / 10_000)
    assert found["uploads"]["int4"]["2"] == found["round_bytes"] and found["exchange"] == "all-reduce"
    assert found["uploads"]["sparse2"]["8"] == 7 * codec("sparse2").encoded_bytes(found["parameters"])
    assert call("check", "--run", ready.path) == 0
    said = capsys.readouterr().out
    assert "sparse2: " in said and "for the cap on uploads" in said


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 100])
def test_steps_are_summed_as_they_are_taken(rounds):
    section = runspec.parse(RUN).rounds
    assert section.steps_before(rounds) == sum(section.steps(number) for number in range(rounds))


# what nodes are promised


def test_a_run_is_published_once_and_says_nothing_of_this_machine(published, store):
    blobs = published.open_blobs()
    first = published.publish(store, blobs)
    assert first == published.publish(store, blobs)
    manifest = first.manifest.manifest
    assert identity.check_manifest(published.key().public, first.manifest) == manifest
    assert manifest.run == identity.run_id(published.key().public, "tiny")
    spec = runspec.RunSpec.from_json(manifest.spec)
    assert spec.coordinator.listen == "0.0.0.0:49300" and spec.data.tokenizer == "bytes"
    assert "127.0.0.1:0" not in manifest.spec and str(published.path) not in manifest.spec
    assert first.base.head == genesis_head(manifest).hash and first.base.state == manifest.genesis
    assert store.shards() == first.corpus.shards and store.heldout() == first.corpus.heldout
    state = archive.rebuild(store, blobs, manifest)
    assert state.digest() == manifest.genesis and state.params.size == manifest.parameters


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("hidden_size = 16", "hidden_size = 32", "[model] config.hidden_size = 32, was 16"),
        ("context = 16", "context = 32", "[data] context = 32, was 16"),
        ("batch_sequences = 2", "batch_sequences = 4", "[train] batch_sequences = 4, was 2"),
        ("[[2, 1], [1, 3]]", "[[2, 1]]", "[rounds] inner_steps"),
        ("[data]", '[update]\ncodec = "fp16"\n[data]', "[update] codec = fp16, was int4"),
        ("rounds = 4", "rounds = 4\nseed = 7", "[run] seed = 7, was 0"),
        ('name = "tiny"', 'name = "other"', "[run] name = other, was tiny"),
    ],
)
def test_a_run_file_that_describes_another_run_is_refused_by_key(published, store, old, new, names):
    published.run_file.write_text(RUN.replace(old, new))
    with pytest.raises(Refused) as caught:
        published.publish(store, published.open_blobs())
    assert caught.value.reason is Code.SPEC_VALUE and names in caught.value.what


def test_what_only_the_coordinator_does_may_change(published, store):
    before = published.publish(store, published.open_blobs())
    text = RUN.replace("rounds = 4", "rounds = 9\nmin_nodes = 2").replace("127.0.0.1:0", "127.0.0.1:50000", 1)
    published.run_file.write_text(text + 'addresses = ["example.org:49300"]\n[evaluate]\nsequences = 8\n')
    assert published.publish(store, published.open_blobs()) == before


def test_data_stays_once_the_run_was_published(published, tmp_path, capsys):
    before = published.open_blobs().digests()
    assert call("data", "add", write_text(tmp_path / "more"), "--run", published.path) == 7
    assert "E-DATA-006" in capsys.readouterr().err and published.open_blobs().digests() == before


def test_a_second_coordinator_of_one_folder_is_refused(published, capsys):
    with published.lock():
        assert published.busy
        assert call("start", "--run", published.path) == 3
        assert "E-HOME-001" in capsys.readouterr().err
        assert call("peers", "--run", published.path) == 0
    assert not published.busy


def test_scratch_of_a_killed_coordinator_is_swept_and_a_link_is_not_followed(published, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine").touch()
    (published.runtime / "old").mkdir()
    (published.runtime / "old.f32").touch()
    (published.runtime / "sockets").symlink_to(tmp_path / "elsewhere")
    with published.lock():
        assert [path.name for path in published.runtime.iterdir()] == ["sockets"]
    assert (tmp_path / "elsewhere/mine").exists()


def test_a_start_without_data_says_what_to_type(folder, capsys):
    assert call("start", "--run", folder.path) == 3
    assert "data add PATH" in capsys.readouterr().err


def test_a_port_in_use_is_exit_code_6_and_nothing_is_left_running(published, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        published.run_file.write_text(RUN.replace('http = "127.0.0.1:0"', f'http = "127.0.0.1:{port}"'))
        assert call("start", "--run", published.path) == 6
    error = capsys.readouterr().err
    assert "E-NET-002" in error and str(port) in error and "Traceback" not in error
    assert not published.busy


# invites


def test_an_invite_is_the_only_line_on_stdout_and_works_offline(published, store, capsys):
    words = ["--uses", "5", "--expires", "2h", "--note", "friends", "--address", "train.example.org:49300"]
    assert call("invite", "create", *words, "--run", published.path) == 0
    output = capsys.readouterr()
    assert output.out.count("\n") == 1 and "barnraise join" in output.err
    found = invite.decode(output.out)
    assert found.addresses == ("train.example.org:49300",) and found.uses == 5
    assert found.coordinator == published.key().public and found.fingerprint == published.fingerprint()
    assert 7_100_000 < found.expires_ms - time.time() * 1000 < 7_200_001
    (kept,) = store.invites()
    assert (kept.token_id, kept.uses, kept.note) == (found.token, 5, "friends")


def test_an_invite_can_be_taken_back_by_its_first_digits_or_by_itself(folder, capsys):
    lines = []
    for _ in range(2):
        assert call("invite", "create", "--address", "127.0.0.1:5", "--run", folder.path) == 0
        lines.append(capsys.readouterr().out.strip())
    assert call("invite", "revoke", invite.decode(lines[0]).token[:10], "--run", folder.path) == 0
    assert call("invite", "revoke", lines[1], "--run", folder.path) == 0
    capsys.readouterr()
    assert call("invite", "list", "--json", "--run", folder.path) == 0
    assert [each["revoked"] for each in json.loads(capsys.readouterr().out)] == [True, True]
    assert call("invite", "list", "--run", folder.path) == 0
    assert capsys.readouterr().out.count("revoked") == 2
    for unknown in ("ffff", "", "-"):
        assert call("invite", "revoke", "--run", folder.path, "--", unknown) in (3, 7)


def test_an_invite_leads_where_the_run_file_says_or_where_the_coordinator_listens(folder, capsys):
    def create():
        code = call("invite", "create", "--run", folder.path)
        output = capsys.readouterr()
        return (invite.decode(output.out).addresses if code == 0 else code), output.err

    where, error = create()
    assert where == 3 and "port 0" in error, "nobody knows the port yet"
    store = folder.open_store()
    assert store.invites() == ()
    store.set("ports", json.dumps({"grpc": 4321, "http": 1, "p2p": 2}).encode())
    store.close()
    where, error = create()
    assert where == ("127.0.0.1:4321",) and "only nodes on this machine" in error
    folder.run_file.write_text(RUN.replace('listen = "127.0.0.1:0"', 'listen = "0.0.0.0:49300"'))
    (where,), error = create()
    assert address.parse(where).port == 49300 and not address.parse(where).unspecified
    folder.run_file.write_text(RUN + 'addresses = ["a.example:1", "b.example:2"]\n')
    assert create()[0] == ("a.example:1", "b.example:2")


def test_a_machine_without_any_address_of_its_own_invites_to_loopback_with_a_warning(folder, capsys, monkeypatch):
    monkeypatch.setattr(reach, "_own_address", lambda: None)
    folder.run_file.write_text(RUN.replace('listen = "127.0.0.1:0"', 'listen = "[::]:49300"'))
    assert call("invite", "create", "--run", folder.path) == 0
    output = capsys.readouterr()
    assert invite.decode(output.out).addresses == ("127.0.0.1:49300",) and "Warning" in output.err


@pytest.mark.parametrize("bad", ["example.org", "0.0.0.0:49300", "http://x:1", "a:0", "x" * 999])
def test_an_address_nobody_can_reach_makes_no_invite(folder, bad, capsys):
    assert call("invite", "create", "--address", bad, "--run", folder.path) == 2
    assert not capsys.readouterr().out
    store = folder.open_store()
    assert store.invites() == ()
    store.close()


# what came of it


def test_runs_are_found_below_with_their_state(published, store, tmp_path, capsys):
    make_run(tmp_path / "new", RUN.replace("tiny", "other"))
    make_run(tmp_path / "broken", "[run]\nnam = 1\n")
    grow(published, store, 2)
    store.save_evaluation(Evaluation(2, 192, 3.25, float("inf"), 1, 2, 10))
    assert call("runs", tmp_path, "--json") == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    tiny = found["tiny"]
    assert (tiny["state"], tiny["round"], tiny["rounds"], tiny["nodes"]) == ("stopped", 2, 4, 2)
    assert (tiny["heldout_loss"], tiny["train_loss"]) == (3.25, None)
    assert found["other"]["state"] == "new" and found["broken"]["state"].startswith("broken: E-SPEC")
    with published.lock():
        assert call("runs", tmp_path) == 0
    said = capsys.readouterr().out
    assert re.search(r"tiny +running +2 of 4 +2 +3\.2500 +", said)
    assert call("runs", tmp_path / "nowhere") == 3


def test_peers_are_listed_with_their_credit(published, store, capsys):
    grow(published, store, 2)
    admit(store, published, "eve\x1b[2J", 9)
    assert call("peers", "--json", "--run", published.path) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["name"], each["credit_tokens"]) for each in found[:2]] == [("ann", 64), ("bob", 128)]
    assert call("peers", "--run", published.path) == 0
    said = capsys.readouterr().out
    assert found[0]["node"][:8] in said and found[0]["node"] not in said and "\x1b" not in said


def roster_of(store, published, *roles):
    """A roster of so many admitted nodes, signed by the run's key."""
    run = published.manifest(store).manifest.run
    nodes = store.nodes()
    members = tuple(Member(each.node, each.peer, (), 1, role) for each, role in zip(nodes, roles, strict=True))
    store.save_roster(sign_roster(published.key(), Roster(run, Epoch(7), members, 0)))


def test_peers_say_who_averages_for_others_and_that_nobody_can_be_called(published, store, capsys):
    admit(store, published, "server", 0), admit(store, published, "home", 1)
    roster_of(store, published, Role.HELPER, Role.CLIENT)
    assert call("peers", "--run", published.path) == 0
    said, warned = capsys.readouterr()
    assert re.search(r"server .* averages for others", said) and re.search(r"home .* outbound-only", said)
    assert "E-NET-003" not in warned
    assert call("peers", "--json", "--run", published.path) == 0
    assert [each["role"] for each in json.loads(capsys.readouterr().out)] == ["helper", "client"]


def test_the_command_that_helps_names_the_run_as_a_shell_needs_it(tmp_path):
    told = reach.helper_command(tmp_path / "a run")
    assert told == (
        f"barnraise join \"$(barnraise-coordinator invite create --run '{tmp_path}/a run')\" --no-training "
        "--listen 0.0.0.0:49303"
    )


def mark(node, kind, reason="because", **more):
    return Mark(node, kind, reason, By.COORDINATOR, 1000, 3, **more)


def test_peers_are_listed_with_what_is_held_against_them_and_with_whom_they_came(published, store, capsys):
    store.add_invite("ab" * 16, uses=3, expires_ms=1 << 50, note="for the\tclub")
    names = {name: admit(store, published, name, at, invite="ab" * 16) for at, name in enumerate(("ann", "bob", "cy"))}
    store.add_marks([mark(names["ann"], Kind.STRIKE, "3 of 5", fault=Fault.TRAINED_WRONG, aside_until=13)])
    store.add_marks([mark(names["bob"], Kind.BAN, "it \x1b[2J lied")])
    assert call("peers", "--run", published.path) == 0
    said = capsys.readouterr().out
    assert re.search(r"ann .* abababab +1 strike; left out until round 13\n", said)
    assert re.search(r"bob .* abababab +banned: it .*lied\n", said) and "\x1b" not in said
    assert call("peers", "ls", "--json", "--run", published.path) == 0
    ann, bob, cy = json.loads(capsys.readouterr().out)
    assert (ann["standing"], ann["until_round"], ann["strikes"], ann["warnings"]) == ("aside", 13, 1, 0)
    assert (bob["standing"], bob["reason"], bob["by"]) == ("banned", "it \x1b[2J lied", "coordinator")
    assert (cy["standing"], cy["trail"], cy["invite"]["nodes"]) == ("welcome", [], 3)
    assert call("invite", "list", "--run", published.path) == 0
    assert re.search(r"abababab .* ann \(aside\), bob \(banned\), cy +for the", capsys.readouterr().out)
    assert call("invite", "list", "--json", "--run", published.path) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)[0]["nodes"]] == ["ann", "bob", "cy"]


def test_a_ban_is_an_order_and_says_who_else_came_with_the_same_invite(published, store, capsys):
    store.add_invite("ab" * 16, uses=9, expires_ms=1 << 50)
    ann, bob = (admit(store, published, name, at, invite="ab" * 16) for at, name in enumerate(("ann", "bob")))
    with coordinator_that_answers(published, "ann is banned", done=True) as bodies:
        command = ("peers", "ban", "Ann", "--reason", "noise", "--revoke-invite", "--json", "--run", published.path)
        assert call(*command) == 0
        assert call("peers", "--run", published.path, "kick", bob[:10], "--for", "1h", "--yes") == 0
    output = capsys.readouterr()
    assert f"ann ({ann[:8]}) came with invite abababab, as did 1 other node: bob." in output.err
    assert json.loads(output.out.splitlines()[0])["state"] == "done"
    assert [(kind, JudgeOrder.from_bytes(body)) for kind, body in bodies] == [
        ("judge", JudgeOrder(ann, Kind.BAN, "noise", 0, True)),
        ("judge", JudgeOrder(bob, Kind.KICK, "", 3600)),
    ]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["ban", "nobody"], 2, "no node is called 'nobody'"),
        (["ban", "twin"], 2, "2 nodes fit 'twin': twin "),
        (["ban", ""], 2, "no node is called ''"),
        (["kick", "ann", "--for", "never"], 2, "not a time span"),
        (["ban", "ann", "--reason", "a\nb"], 2, "one line"),
        (["ban"], 2, "NODE"),
    ],
)
def test_an_order_about_nobody_or_about_several_is_refused_before_it_is_placed(
    published, store, words, code, says, capsys
):
    for at, name in enumerate(("ann", "twin", "twin")):
        admit(store, published, name, at)
    assert call("peers", *words, "--run", published.path) == code
    assert says in capsys.readouterr().err and not store.open_orders()


def test_a_person_is_asked_before_a_ban_and_may_say_no(published, store, monkeypatch, capsys):
    admit(store, published, "ann", 0)
    monkeypatch.setattr(cli, "_agreed", lambda question: question != "Ban it?")
    assert call("peers", "ban", "ann", "--run", published.path) == 130
    assert "Nothing was changed" in capsys.readouterr().err and not store.open_orders()


# the archive


def test_the_archive_folds_to_any_round_from_the_nearest_checkpoint(published, store, tmp_path):
    from protocol.state import write_base
    from protocol.types import BaseCheckpoint

    digests = grow(published, store, 4)
    manifest, blobs = published.manifest(store).manifest, published.open_blobs()
    for number, digest in enumerate(digests):
        assert archive.rebuild(store, blobs, manifest, number).digest() == digest
    assert archive.rebuild(store, blobs, manifest).round == 4
    state = archive.rebuild(store, blobs, manifest, 3)
    write_base(tmp_path / "base", state)
    ref = blobs.put_file(tmp_path / "base")
    store.save_base(BaseCheckpoint(3, next_head(store.entries(2, 1)[0].record).hash, state.digest(), ref))
    for entry in store.entries(0, 3):
        blobs.delete(entry.record.parts[0].digest)
    assert archive.rebuild(store, blobs, manifest).digest() == digests[4], "the newer checkpoint was not used"
    for number in (5, -1):
        with pytest.raises(Refused):
            archive.rebuild(store, blobs, manifest, number)


def test_a_bad_checkpoint_is_passed_over_for_an_older_one(published, store):
    from protocol.types import BaseCheckpoint

    digests = grow(published, store, 2)
    blobs = published.open_blobs()
    store.save_base(BaseCheckpoint(2, "0" * 64, digests[2], blobs.put_bytes(b"rotten")))
    assert archive.rebuild(store, blobs, published.manifest(store).manifest).digest() == digests[2]


def test_the_archive_stops_before_a_part_that_is_missing_or_has_rotted(published, store):
    digests = grow(published, store, 3)
    manifest, blobs = published.manifest(store).manifest, published.open_blobs()
    part = store.entries(1, 1)[0].record.parts[0].digest
    blobs.path(part).write_bytes(b"x" * blobs.size(part))
    assert archive.rebuild(store, blobs, manifest).digest() == digests[1]
    assert not blobs.has(part), "nobody will be asked for it again"
    with pytest.raises(Refused) as caught:
        archive.rebuild(store, blobs, manifest, 3)
    assert caught.value.reason is Code.BLOB_MISSING


def test_the_archive_stops_before_a_record_that_starts_from_another_state(published, store):
    digests = grow(published, store, 1)
    (entry,) = store.entries()
    manifest, blobs = published.manifest(store).manifest, published.open_blobs()
    forged = replace(entry.record, round=1, previous=next_head(entry.record).hash, state=manifest.genesis)
    store.append_entry(LogEntry(forged, entry.certificate), {})
    assert archive.rebuild(store, blobs, manifest).digest() == digests[1]
    with pytest.raises(Refused) as caught:
        archive.rebuild(store, blobs, manifest, 2)
    assert caught.value.reason is Code.STATE_MISMATCH and "record 1" in caught.value.what


def test_the_export_is_the_state_of_the_log(published, store, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    from protocol import model

    digests = grow(published, store, 2)
    store.save_evaluation(Evaluation(2, 192, 3.25, None, 1, 2, 10))
    assert call("export", tmp_path / "model", "--run", published.path) == 0
    assert digests[2][:16] in capsys.readouterr().out
    facts = json.loads((tmp_path / "model/barnraise.json").read_text())["facts"]
    assert (facts["round"], facts["state"], facts["tokens"], facts["heldout_loss"]) == (2, digests[2], 192, 3.25)
    assert [(each["name"], each["tokens"]) for each in facts["contributors"]] == [("bob", 128), ("ann", 64)]
    assert str(tmp_path) not in (tmp_path / "model/README.md").read_text()
    state = archive.rebuild(store, published.open_blobs(), published.manifest(store).manifest)
    loaded = np.empty_like(state.params)
    model.flatten(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), loaded)
    assert np.array_equal(loaded, state.params)
    assert call("export", tmp_path / "model", "--round", "1", "--run", published.path) == 0
    facts = json.loads((tmp_path / "model/barnraise.json").read_text())["facts"]
    assert (facts["round"], facts["state"], facts["heldout_loss"]) == (1, digests[1], None)
    assert call("export", tmp_path / "model", "--round", "3", "--run", published.path) == 3
    assert call("export", tmp_path / "text", "--run", published.path) == 0

    first = store.entries()[0].record.contributions[0]
    store.add_marks([mark(first.node, Kind.STRIKE, fault=Fault.TRAINED_WRONG, void=(first.update,))])
    assert call("export", tmp_path / "model", "--run", published.path) == 0
    left = json.loads((tmp_path / "model/barnraise.json").read_text())["facts"]["tokens"]
    assert left == 192 - sum(
        each.tokens
        for entry in store.entries()
        for each in entry.record.contributions
        if (each.node, each.update) == (first.node, first.update)
    )
    assert left < 192


def test_a_run_that_never_started_has_no_export(ready, tmp_path, capsys):
    assert call("export", tmp_path / "model", "--run", ready.path) == 3
    assert "never started" in capsys.readouterr().err and not (tmp_path / "model").exists()


# the real process


PLAIN = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}  # no home folder, no terminal
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ODD = PLAIN | ASCII | {"TERM": "dumb", "COLUMNS": "20", "TZ": "Asia/Kathmandu"}


def test_any_terminal_and_any_clock_will_do(kept_once, tmp_path, capsys):
    folder = RunFolder(tmp_path / "läuft 日本")
    shutil.copytree(kept_once.path, folder.path)
    run = ("--run", str(folder.path))
    assert call("invite", "create", "--address", "h:1", "--note", "für 日本 🙂", *run) == 0
    capsys.readouterr()
    assert call("invite", "list", *run) == 0
    when = re.search(r"[0-9-]+ [0-9:]+ UTC", capsys.readouterr().out)[0]
    other = PLAIN | {"PYTHONIOENCODING": "ascii", "COLUMNS": "1", "TZ": "Nonsense/Where"}
    for words, environment, says in (
        (["--help"], ODD, "invite"),
        (["runs", str(tmp_path)], ODD, "tiny"),
        (["ledger", *run], ODD, "ann"),
        (["invite", "list", *run], ODD, when),
        (["invite", "list", *run], other, when),
    ):
        command = [sys.executable, "-m", "coordinator.cli", *words]
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        assert done.returncode == 0 and says in done.stdout.decode("ascii") and not done.stderr, (words, done)


def test_a_coordinator_serves_until_it_is_asked_to_stop_and_invites_work_beside_it(published, capsys):
    with closing(published.open_store()) as store:
        ann, bob = (admit(store, published, name, at) for at, name in enumerate(("ann", "bob")))
    assert call("peers", "ban", "ann", "--reason", "before the start", "--run", published.path) == 0
    assert "at the next barnraise-coordinator start" in capsys.readouterr().out
    command = [sys.executable, "-m", "coordinator.cli", "start", "--run", str(published.path)]
    with subprocess.Popen(
        command,
        env=ODD | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            lines = [process.stdout.readline() for _ in range(5)]
            said = "".join(lines)
            assert "a node's trainer takes" in lines[-1], said
            page = re.search(r"http://127\.0\.0\.1:(\d+)", said)
            assert page and "invite create" in said, said
            socket.create_connection(("127.0.0.1", int(page[1])), timeout=5).close()
            assert call("invite", "create", "--run", published.path) == 0
            where = address.parse(invite.decode(capsys.readouterr().out).addresses[0])
            socket.create_connection((where.host, where.port), timeout=5).close()
            assert f"{where}" in said
            assert call("start", "--run", published.path) == 3
            with closing(published.open_store()) as store:
                assert [(mark.node, mark.kind) for mark in store.marks()] == [(ann, Kind.BAN)]
            began = time.monotonic()
            assert call("peers", "kick", bob[:12], "--for", "90m", "--run", published.path) == 0
            assert time.monotonic() - began < 2 and "✓ bob is sent away for 90 min" in capsys.readouterr().out
            assert call("peers", "ban", "ann", "--run", published.path) == 7
            assert "ann is banned already" in capsys.readouterr().err
            assert call("peers", "unban", "ann", "--run", published.path) == 0
        finally:
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    with pytest.raises(OSError):
        socket.create_connection((where.host, where.port), timeout=5)
    assert not published.busy and not list(published.runtime.iterdir())
    capsys.readouterr()
    assert call("peers", "ls", "--json", "--run", published.path) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert (found["ann"]["standing"], found["bob"]["standing"]) == ("welcome", "sent away")
    trail = [(mark["kind"], mark["by"], mark["reason"]) for mark in found["ann"]["trail"]]
    assert trail == [("ban", "researcher", "before the start"), ("unban", "researcher", "")]


@pytest.mark.parametrize("victim", ["coordinator.rendezvous", "p2pd"])
def test_a_rendezvous_that_ends_is_started_again_where_it_was(published, victim):
    command = [sys.executable, "-m", "coordinator.cli", "start", "--run", str(published.path)]

    def found(process):
        tree = psutil.Process(process.pid).children(recursive=True)
        alive = [each for each in tree if each.status() != psutil.STATUS_ZOMBIE]
        return [each for each in alive if victim in " ".join(each.cmdline())]

    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            with closing(published.open_store()) as store:
                port = json.loads(store.get("ports"))["p2p"]
            (first,) = found(process)
            limit = p2pd.DATA_BYTES_MAX if victim == "p2pd" else psutil.RLIM_INFINITY
            assert first.rlimit(psutil.RLIMIT_DATA)[0] == limit
            first.kill()
            deadline = time.monotonic() + 60
            while not (found(process) and first not in found(process) and is_open(port)):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert process.returncode == 130 and not is_open(port) and not list(published.runtime.iterdir())


def is_open(port):
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


# the ledger


def keep_books(folder, store, rounds=4, *, undone=2, later=1, lie_at=None):
    """A run as a coordinator leaves it: certified rounds of two nodes, the last of them undone, and rounds after that."""
    signed, blobs, packing = folder.manifest(store), folder.open_blobs(), Packing(codec("int4"), codec("int4"))
    manifest, outer = signed.manifest, archive.outer_of(folder.spec().update)
    state = archive.rebuild(store, blobs, manifest)
    keys = {}
    for name in ("ann", "bob"):
        key = Key.generate()
        peer = peer_id_of(key.public_bytes)
        body = Pass(manifest.run, key.public, peer, name, 0, 1 << 50)
        store.save_node(StoredNode(key.public, peer, name, None, identity.sign_pass(folder.key(), body), 1000))
        keys[key.public] = key
    members = tuple(Member(node, peer_id_of(key.public_bytes), (), 1 << 40) for node, key in keys.items())
    head, leases, tokens = genesis_head(manifest), Leases(store.shards()), 0
    story = [*range(rounds), "rollback", *range(later)] if undone else [*range(rounds)]
    store.save_roster(
        identity.sign_roster(folder.key(), Roster(manifest.run, 0, members, 5, manifest=genesis_head(manifest).hash))
    )
    epoch = 0
    store.save_evaluation(Evaluation(0, 0, 5.5, None, 1, 2, 10))
    for place, what in enumerate(story):
        if what == "rollback":
            to = rounds - undone
            gone = store.entries(to)
            hashed = store.entries(to - 1, 1)[0] if to else None
            kept = next_head(hashed.record) if hashed else genesis_head(manifest)
            turn = Rollback(manifest.run, 1, kept, head, "it diverged", 7)
            spans = [span for entry in gone for span in ranges_of(entry.record)]
            leases = replace(leases, returned=(*leases.returned, *spans))
            store.save_rollback(identity.sign_rollback(folder.key(), turn), leases)
            head, epoch = head_after(turn), 1
            tokens -= sum(each.tokens for entry in gone for each in entry.record.contributions)
            roster = Roster(manifest.run, 1, members, 8, floor=to, branch=1, manifest=genesis_head(manifest).hash)
            store.save_roster(identity.sign_roster(folder.key(), roster))
            state = archive.rebuild(store, blobs, manifest)
            continue
        values = np.random.default_rng(place).standard_normal(manifest.parameters).astype(np.float32) / 100
        ref = blobs.put_bytes(packing.up.encode(values))
        part = Part(0, 0, manifest.parameters, ref.digest, ref.size, members[0].node, tuple(keys))
        contributions = []
        for node in keys:
            leases, granted = data.grant(leases, node, sequences=2, largest=2, until_ms=9)
            ranges = tuple(lease.range for lease in granted)
            grants = tuple(Grant(span, sign_grant(folder.key(), manifest.run, node, span)) for span in ranges)
            told = Contribution(node, 32, ranges, grants, "22" * 32)
            contributions.append(contribution.sign(keys[node], manifest.run, head.round, head.hash, told))
        leases, _ = data.grant(leases, members[0].node, sequences=1, largest=1, until_ms=9)
        before = "33" * 32 if place == lie_at else state.digest()
        record = Record(
            manifest.run, head.round, head.hash, epoch, members[0].node, tuple(contributions), (part,), before
        )
        head = next_head(record)
        body = vote_bytes(VoteBody(record.run, record.round, Ballot(epoch, 0), head.hash))
        votes = tuple(Signature(node, key.sign(VOTE, body)) for node, key in keys.items())
        leases = data.consume(leases, ranges_of(record))
        entry = LogEntry(record, Certificate(head.hash, Ballot(epoch, 0), votes))
        store.append_entry(entry, {each.node: each.tokens for each in contributions}, leases)
        fold(state, record, {0: blobs.read(ref.digest)}, packing, outer)
        tokens += 64
        store.save_evaluation(Evaluation(head.round, tokens, 5.0 - place / 10, None, 1, 2, 10))
    return state


@pytest.fixture(scope="module")
def kept_once(published_once, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("kept") / "run")
    shutil.copytree(published_once.path, folder.path)
    store = folder.open_store()
    keep_books(folder, store)
    store.close()
    return folder


@pytest.fixture
def kept(kept_once, tmp_path):
    shutil.copytree(kept_once.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture
def kept_store(kept):
    store = kept.open_store()
    yield store
    store.close()


def alter(folder, statement, *values):
    """Change the database behind everybody's back."""
    connection = sqlite3.connect(folder.database)
    with connection:
        assert connection.execute(statement, values).rowcount == 1, statement
    connection.close()


def test_the_ledger_says_who_contributed_what_and_what_was_undone(kept, capsys):
    assert call("ledger", "--run", kept.path) == 0
    said = capsys.readouterr().out
    assert re.search(r"ann +\w{8} +160 +64 +5\n", said)
    assert "320 tokens of 2 nodes in 5 records; 1 rollback undid 2 records and 128 tokens of them" in said
    assert call("ledger", "--json", "--run", kept.path) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(each["name"], each["tokens"], each["undone_tokens"]) for each in found["nodes"]} == {
        ("ann", 160, 64),
        ("bob", 160, 64),
    }
    assert (found["tokens"], found["records"], found["undone_records"]) == (320, 5, 2)
    assert found["frozen_tokens"] == 0
    (rollback,) = found["rollbacks"]
    assert (rollback["to"], rollback["from"], rollback["reason"]) == (2, 4, "it diverged")


@pytest.mark.parametrize("words", [[], ["--deep"], ["--json"], ["--deep", "--json"]])
def test_true_books_verify_beside_a_coordinator_and_nothing_is_changed(kept, words, capsys):
    before = {path: path.read_bytes() for path in kept.ours.rglob("*") if path.is_file() and path.suffix != ".db-shm"}
    writer = sqlite3.connect(kept.database, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE nodes SET credit_tokens = 1")  # nobody sees what is not committed
    with kept.lock():
        assert call("ledger", "verify", "--run", kept.path, *words) == 0
    writer.execute("ROLLBACK")
    writer.close()
    said = capsys.readouterr().out
    if "--json" in words:
        found = json.loads(said)
        assert found["ok"] and found["finding"] is None
        assert (found["records"], found["undone"], found["tokens"], found["sequences"]) == (3, 2, 192, 12)
        assert found["folded"] == (5 if "--deep" in words else None)
    else:
        assert "Every row is what the log says: 3 records and 2 that 1 rollback undid" in said
        assert ("folds to the same states: 5 records." in said) == ("--deep" in words)
    after = {path: path.read_bytes() for path in before if path.name != "lock"}
    assert after == {path: data for path, data in before.items() if path.name != "lock"}


@pytest.mark.parametrize(
    ("table", "statement"),
    [
        ("nodes", "UPDATE nodes SET credit_tokens = credit_tokens + 1 WHERE name = 'ann'"),
        ("nodes", "UPDATE nodes SET credit_tokens = 'much' WHERE name = 'ann'"),
        ("nodes", "DELETE FROM nodes WHERE name = 'bob'"),
        ("entries", "UPDATE entries SET undone = NULL WHERE id = 4"),
        ("entries", "UPDATE entries SET undone = 1 WHERE id = 5"),
        ("entries", "UPDATE entries SET hash = 'x' WHERE id = 1"),
        ("entries", "UPDATE entries SET round = 9 WHERE id = 5"),
        ("entries", "UPDATE entries SET bytes = substr(bytes, 2) WHERE id = 3"),
        ("entries", "UPDATE entries SET bytes = 'text' WHERE id = 3"),
        ("entries", "DELETE FROM entries WHERE id = 1"),
        ("rollbacks", "UPDATE rollbacks SET bytes = x'00' WHERE number = 1"),
        ("entries", "DELETE FROM rollbacks WHERE number = 1"),
        ("entries", "DELETE FROM rosters WHERE epoch = 1"),
        ("rosters", "UPDATE rosters SET epoch = 5 WHERE epoch = 1"),
        ("parts", "DELETE FROM parts WHERE entry = 2"),
        ("parts", "UPDATE parts SET entry = 99 WHERE entry = 2"),
        ("cursor", "UPDATE cursor SET serial = 'a' WHERE id = 0"),
        ("leases", "UPDATE cursor SET serial = 0 WHERE id = 0"),
        ("leases", "UPDATE leases SET lease_id = '0' WHERE rowid = 1"),
        ("cursor", "DELETE FROM leases WHERE rowid = 1"),
        ("leases", "UPDATE leases SET lease_id = x'ff' WHERE rowid = 1"),
        ("parts", "UPDATE parts SET digest = x'ff' WHERE entry = 2"),
        ("nodes", "UPDATE nodes SET node = x'ff' WHERE name = 'bob'"),
        ("bases", "UPDATE bases SET round = 1 WHERE round = 0"),
        ("evaluations", "UPDATE evaluations SET tokens = tokens + 64 WHERE round = 1"),
        ("evaluations", "UPDATE evaluations SET undone = 1 WHERE round = 1"),
        ("meta", "UPDATE meta SET value = substr(value, 2) WHERE key = 'manifest'"),
        ("shards", "UPDATE shards SET bytes = x'00' WHERE position = 0"),
    ],
)
def test_a_wrong_row_of_the_database_is_named_with_exit_code_4(kept, table, statement, capsys):
    alter(kept, statement)
    assert call("ledger", "verify", "--run", kept.path) == 4
    output = capsys.readouterr()
    assert f"E-LEDGER-001 · {table}, " in output.err and "the log says" in output.err and not output.out
    assert call("ledger", "verify", "--json", "--run", kept.path) == 4
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and found["finding"]["table"] == table


def test_a_database_that_is_none_is_a_sentence(kept, kept_store, capsys):
    kept_store.close()
    for path in kept.ours.glob("coordinator.db-*"):
        path.unlink()
    kept.database.write_bytes(b"not a database" * 99)
    for words in (["ledger"], ["ledger", "verify"]):
        assert call(*words, "--run", kept.path) == 4
        assert "E-STORE-001" in capsys.readouterr().err


def test_a_run_that_never_started_has_no_ledger(folder, ready, capsys):
    for words in (["ledger"], ["ledger", "verify"], ["rollback", "--to", "0"]):
        assert call(*words, "--run", ready.path) == 3
        assert "never started" in capsys.readouterr().err


def test_what_rotted_on_disk_is_found_by_reading_it_again(kept, kept_store, capsys):
    blobs, entries = kept.open_blobs(), kept_store.entries()
    first, last = (entry.record.parts[0].digest for entry in (entries[0], entries[-1]))
    for digest, table in ((first, "parts"), (kept_store.bases()[0].blob.digest, "bases")):
        whole = blobs.path(digest).read_bytes()
        blobs.path(digest).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert call("ledger", "verify", "--run", kept.path) == 0
        assert call("ledger", "verify", "--deep", "--run", kept.path) == 4
        assert f"{table}, " in capsys.readouterr().err
        blobs.delete(digest)
        assert call("ledger", "verify", "--deep", "--run", kept.path) == 4
        assert f"{table}, " in capsys.readouterr().err
        blobs.put_bytes(whole)
    assert call("ledger", "verify", "--deep", "--run", kept.path) == 0
    alter(kept, "DELETE FROM evaluations WHERE round = 3 AND undone IS NULL")
    blobs.delete(last)  # nothing says that this record was ever folded here: its part may be on its way
    capsys.readouterr()
    assert call("ledger", "verify", "--deep", "--run", kept.path) == 0
    assert "4 records; 1 record wait" in capsys.readouterr().out


def test_a_state_that_members_certified_but_the_records_do_not_lead_to_is_found_by_folding(published, store, capsys):
    keep_books(published, store, 3, undone=0, lie_at=2)
    assert call("ledger", "verify", "--run", published.path) == 0
    assert call("ledger", "verify", "--deep", "--run", published.path) == 4
    assert "entries, round 2, " in (error := capsys.readouterr().err) and "it says state 333333333333" in error


def test_the_ledger_loads_no_torch(kept):
    code = (
        "import sys; from coordinator import cli; from protocol import console\n"
        f"words = ['ledger', 'verify', '--deep', '--run', {str(kept.path)!r}]\n"
        "code = console.main(cli.app, program='x', short_help='', arguments=words)\n"
        "sys.exit(code or ' '.join({'torch', 'transformers', 'hivemind', 'grpc', 'pyarrow'} & set(sys.modules)) or None)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# going back


@contextmanager
def coordinator_that_answers(folder, answer, *, done):
    """Somebody who holds the run's lock, and answers every order."""
    bodies, stop = [], threading.Event()

    def work():
        store = folder.open_store()
        while not stop.wait(0.02):
            for order in store.open_orders():
                bodies.append((order.kind, order.body))
                store.close_order(order.order_id, answer=answer, done=done)
        store.close()

    with folder.lock():
        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield bodies
        finally:
            stop.set()
            thread.join()


def test_a_rollback_is_an_order_that_the_running_coordinator_answers(kept, capsys):
    with coordinator_that_answers(kept, "went back to round 1", done=True) as bodies:
        assert call("rollback", kept.path, "--to", "1", "--reason", "too hot") == 0
    output = capsys.readouterr()
    assert "undoes 2 rounds and 128 tokens" in output.err
    assert "Held-out loss was 4.9000 after 2 rounds; it is" not in output.err
    assert "Held-out loss was 5.0000 after 1 round; it is 4.5000 after 3." in output.err
    assert output.out == "✓ went back to round 1\n"
    assert [(kind, RollbackOrder.from_bytes(body)) for kind, body in bodies] == [
        ("rollback", RollbackOrder(1, "too hot"))
    ]


def test_an_order_that_is_refused_is_exit_code_7_with_the_reason(kept, capsys):
    with coordinator_that_answers(kept, "the log has moved on", done=False):
        assert call("rollback", "--run", kept.path, "--to", "3") == 7
    error = capsys.readouterr().err
    assert "nothing is undone" in error and "E-ORDER-001 · the log has moved on" in error
    with coordinator_that_answers(kept, "no", done=False):
        assert call("rollback", "--run", kept.path, "--to", "3", "--json") == 7
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["answer"], found["undone_rounds"]) == ("refused", "no", 0)


def test_without_a_coordinator_the_order_waits_for_the_next_start(kept, kept_store, capsys):
    assert call("rollback", kept.path, "--run", kept.path, "--to", "0", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["undone_rounds"], found["undone_tokens"]) == ("open", 3, 192)
    assert (found["heldout"], found["heldout_now"]) == ({"round": 0, "loss": 5.5}, {"round": 3, "loss": 4.5})
    assert call("rollback", "--run", kept.path, "--to", "0") == 0
    assert "at the next barnraise-coordinator start" in capsys.readouterr().out
    assert [order.order_id for order in kept_store.open_orders()] == [found["order"], found["order"] + 1]


def test_a_coordinator_that_does_not_answer_is_said_to_be_silent_and_the_order_stays(
    kept, kept_store, monkeypatch, capsys
):
    monkeypatch.setattr(cli, "ANSWER_SECONDS", 0.3)
    with kept.lock():
        assert call("rollback", "--run", kept.path, "--to", "1") == 6
    assert "has not answered" in capsys.readouterr().err and len(kept_store.open_orders()) == 1


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--to", "4"], 3, "round 4, the log has 0 to 3"),
        (["--to", "-1"], 2, "--to"),
        ([], 2, "--to"),
        (["--to", "1", "--reason", "x" * 201], 2, "at most 200 characters"),
        (["--to", "1", "--reason", "a\nb"], 2, "one line"),
        (["--to", "1", "elsewhere"], 2, "two folders"),
    ],
)
def test_a_rollback_that_cannot_be_is_refused_before_an_order_is_placed(kept, kept_store, words, code, says, capsys):
    assert call("rollback", "--run", kept.path, *words) == code
    assert says in capsys.readouterr().err and not kept_store.open_orders()


def test_a_person_is_asked_first_and_may_say_no(kept, kept_store, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cli, "_agreed", lambda question: asked.append(question))
    assert call("rollback", "--run", kept.path, "--to", "1") == 130
    assert "Nothing was changed" in capsys.readouterr().err and not kept_store.open_orders()
    assert call("rollback", "--run", kept.path, "--to", "3") == 130
    assert call("rollback", "--run", kept.path, "--to", "1", "--yes") == 0
    assert asked == ["Go back?", "Begin a new roster?"] and len(kept_store.open_orders()) == 1


def test_the_ledger_freezes_what_a_banned_node_was_credited_with_since(kept, kept_store, capsys):
    """Its contribution may have been in the round that was being decided: the record stays, and says so."""
    ann = next(each.node for each in kept_store.nodes() if each.name == "ann")
    kept_store.add_marks([replace(mark(ann, Kind.BAN, "it lied"), round=2)])
    assert call("ledger", "--run", kept.path) == 0
    said = capsys.readouterr().out
    assert re.search(r"ann +\w{8} +160 +64 +5 +32 +it lied\n", said) and "; 32 of them are frozen" in said
    assert call("ledger", "--json", "--run", kept.path) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["frozen_tokens"] == 32
    assert {each["name"]: each["shut_out"] for each in found["nodes"]} == {"ann": "it lied", "bob": None}
    assert call("ledger", "verify", "--run", kept.path) == 0


@pytest.mark.parametrize("body", [b"", b"{}", b'{"reason":"","to":-1}', b'{"reason":"a\\nb","to":1}', b'{"to": 1}'])
def test_a_body_that_is_no_order_is_refused(body):
    with pytest.raises(Refused):
        RollbackOrder.from_bytes(body)


@pytest.mark.parametrize(
    "order",
    [
        JudgeOrder("a" * 64, Kind.STRIKE, ""),
        JudgeOrder("a" * 64, Kind.KICK, ""),
        JudgeOrder("a" * 64, Kind.BAN, "", 60),
        JudgeOrder("a" * 64, Kind.BAN, "a\nb"),
        JudgeOrder("a" * 64, Kind.BAN, "x" * 201),
    ],
)
def test_an_order_that_cannot_be_is_refused(order):
    with pytest.raises(Refused):
        JudgeOrder.from_bytes(order.to_bytes())


def test_a_new_certificate_is_one_command_and_endorsed_by_the_run(folder, capsys):
    shown = []
    for words in ((), ("--new",), ()):
        assert call("certificate", *words, "--run", folder.path, "--json") == 0
        shown.append(json.loads(capsys.readouterr().out)["fingerprint"])
    assert shown[0] != shown[1] == shown[2]
    der = ssl.PEM_cert_to_DER_cert(folder.tls()[1].read_text())
    assert tls.endorsed(der, folder.run_id()) > 0
