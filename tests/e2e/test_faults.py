"""Bad input and sudden deaths, with real processes: a clear end with its exit code, or a run that goes on."""

import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from node.config import Home
from protocol import invite as invites
from protocol import sandbox
from protocol.errors import Code
from tests.e2e.processes import PATIENCE_SECONDS, TEXT, TINY, Node, Run, World, free_ports, gone, until, words_of

ROUNDS_OF_A_FRACTION_OF_A_SECOND = {"rounds": {**TINY["rounds"], "inner_steps": [[1, 12]]}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One world for all faults that leave its run whole; at the end it leaves nothing behind."""
    world = World(tmp_path_factory.mktemp("shared") / "world")
    yield world
    world.close()


@pytest.fixture(scope="module")
def run(shared):
    run = Run(shared, settings=ROUNDS_OF_A_FRACTION_OF_A_SECOND)
    run.add(*TEXT)
    run.start()
    return run


@pytest.fixture(scope="module")
def pair(shared, run):
    """Two nodes in full swing, each with an invite of its own, which is used up."""
    pair = Node(shared, "ash"), Node(shared, "birch")
    for node in pair:
        node.invite = run.invite("--uses", "1")
        node.join(node.invite)
    for node in pair:
        node.reaches(1)
    return pair


@pytest.fixture
def stranger(shared, request):
    """A home that nobody has used yet."""
    return Node(shared, f"stranger-{abs(hash(request.node.name)) % 10**6}")


def refused(node, invite, reason, *words):
    """The one-line refusal of a join, which must leave nothing of the run in the home."""
    options = ("--home", node.home, "--yes", "--json", "--listen", "127.0.0.1:0", *words)
    _, complaint = node.world.call("barnraise", "join", invite, *options, code=reason.exit.value)
    assert reason.code in complaint and "Fix: " in complaint and "Traceback" not in complaint
    home = Home(node.home)
    assert not [path for path in home.blobs.rglob("*") if path.is_file() and path.stat().st_size]
    assert not home.control.exists()
    return complaint


# ports; before any node trains, because they are quicker then


@pytest.fixture(scope="module")
def idle(shared):
    """A run that is ready to start and needs no more than a little text."""
    run = Run(shared, "idle")
    run.add(TEXT[2])
    return run


@pytest.mark.parametrize("door", ["listen", "http", "p2p"])
def test_a_coordinator_whose_port_is_taken_ends_and_leaves_nothing_running(shared, idle, door):
    before = {process.pid for process in shared.family()}
    ports = dict(zip(("listen", "http", "p2p"), free_ports(3), strict=True))
    idle.write({"coordinator": {key: f"127.0.0.1:{port}" for key, port in ports.items()}})
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", ports[door]))
        holder.listen()
        words = ("start", "--run", idle.folder, "--json")
        out, complaint = shared.call("barnraise-coordinator", *words, code=Code.PORT_IN_USE.exit.value)
    assert Code.PORT_IN_USE.code in complaint and str(ports[door]) in complaint and not out
    new = [process for process in shared.family() if process.pid not in before]
    assert not [process for process in new if str(idle.folder) in " ".join(words_of(process))]
    assert not list((idle.folder / ".barnraise" / "runtime").iterdir())


def test_a_node_whose_port_is_taken_says_so_and_ends(shared, run, stranger):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        door = "{}:{}".format(*holder.getsockname())
        words = ("join", run.invite(), "--yes", "--home", stranger.home, "--listen", door, "--device", "cpu", "--json")
        _, complaint = shared.call("barnraise", *words, code=Code.PORT_IN_USE.exit.value)
    assert Code.PORT_IN_USE.code in complaint and door.rpartition(":")[2] in complaint


# invites


def test_an_invite_of_another_coordinator_at_the_same_port_is_refused_by_its_pin(shared, run, stranger):
    other = Run(shared, "other", ports=(run.grpc, run.http, run.p2p))
    refused(stranger, other.invite("--address", f"127.0.0.1:{run.grpc}"), Code.PIN_MISMATCH)
    assert Home(stranger.home).remembered() is None


def test_a_used_invite_is_refused(pair, stranger):
    refused(stranger, pair[0].invite, Code.INVITE_USED)
    assert Home(stranger.home).remembered() is None


def test_an_expired_invite_is_refused(run, stranger):
    text = run.invite("--expires", "1s")
    until(lambda: invites.decode(text).expired(int(time.time() * 1000)), "the invite is over")
    refused(stranger, text, Code.INVITE_EXPIRED)
    assert not stranger.home.exists()


def test_a_mistyped_invite_is_refused_before_anybody_is_asked(pair, stranger):
    text = pair[0].invite
    refused(stranger, text[:40] + ("a" if text[40] != "a" else "b") + text[41:], Code.INVITE_MISTYPED)
    assert not stranger.home.exists()


# local limits


def test_a_second_daemon_on_the_same_home_is_refused_and_the_first_goes_on(pair):
    ash, _ = pair
    before = ash.status()["round"]
    _, complaint = ash.tell("start", code=Code.HOME_BUSY.exit.value)
    assert Code.HOME_BUSY.code in complaint
    ash.reaches(before + 1)


def test_a_model_over_the_disk_cap_is_refused_and_nothing_of_it_is_kept(run, pair, stranger):
    refused(stranger, run.invite(), Code.BLOB_TOO_LARGE, "--max-disk", "100kB")
    pair[0].reaches(pair[0].status()["round"] + 1)


def test_the_trainer_of_a_node_is_shut_in_and_its_status_says_how(pair):
    ash, _ = pair
    kernel = sandbox.kernel()
    assert ash.status()["sandbox"] == sandbox.plan(sandbox.Mode.AUTO, kernel).text
    held = Path(f"/proc/{ash.part('node.trainer').pid}/status")
    if kernel.seccomp:
        assert {"Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"} <= set(held.read_text().splitlines())


# deaths


@pytest.mark.parametrize("module", ["node.trainer", "node.swarm"])
def test_a_killed_child_of_a_node_is_started_again_and_rounds_go_on(pair, module):
    ash, birch = pair
    child = ash.part(module)
    tree = [child, *child.children(recursive=True)]
    child.kill()
    gone(tree)
    until(lambda: ash.status()["activity"] == "syncing", "the node notices")
    now = until(lambda: ash.status()["activity"] == "training" and ash.rostered(), "the child is back")
    birch.reaches(contributes(ash, now["round"]))


def contributes(node, start):
    """Wait until a round from this one on has taken something of the node; answers with the round."""

    def found():
        recent = [row["round"] for row in node.status()["recent"] if row["outcome"] == "accepted"]
        return max(recent) + 1 if recent and max(recent) >= start else None

    return until(found, f"{node.name} brings something to a round")


def test_a_leader_that_is_paused_is_left_out_and_comes_back(run, pair):
    leads = until(lambda: leader_now(run, pair), "a node leads")
    (other,) = [node for node in pair if node is not leads]
    leads.tell("pause")
    assert leads.status()["activity"] == "paused"
    until(lambda: not leads.status()["rostered"], "the paused node is left out")
    other.reaches(other.status()["round"] + 1)
    steps = leads.status()["round_steps"]
    other.reaches(other.status()["round"] + 2)
    assert leads.status()["round_steps"] == steps, "a paused node trains nothing"
    leads.tell("resume")
    leads.rostered()
    other.reaches(contributes(leads, leads.status()["round"]))


def leader_now(run, pair):
    """The node that leads the round which is being trained for, should its first attempt succeed."""
    members = run.members()
    for node in pair:
        now = node.status()
        if len(members) == 2 and members[now["round"] % 2].startswith(now["node"]):
            return node
    return None


def test_rounds_go_on_while_the_coordinator_is_away_and_are_archived_when_it_is_back(run, pair):
    run.kill()
    before = max(node.status()["round"] for node in pair)
    for node in pair:
        until(lambda node=node: not node.status()["linked"], f"{node.name} misses the coordinator")
        node.reaches(before + 3)
    run.start()
    for node in pair:
        until(lambda node=node: node.status()["linked"], f"{node.name} is linked again")
    until(lambda: len(run.entries()) >= before + 3, "the log is archived")
    until(lambda: len(run.members()) == 2, "both nodes are rostered again")
    head = max(contributes(node, node.status()["round"]) for node in pair)
    until(lambda: run.page("status")["run"]["round"] >= head, "the coordinator follows")


def copied(home: Path, to: Path) -> None:
    """As by whoever copies the folder of a node that runs: what it replaces or removes meanwhile is not copied."""

    def copy_unless_gone(source: str, target: str) -> str:
        with suppress(FileNotFoundError):
            shutil.copy2(source, target)
        return target

    shutil.copytree(home, to, ignore=shutil.ignore_patterns("runtime", "*.sock"), copy_function=copy_unless_gone)


def test_a_copy_of_a_node_that_runs_is_refused_and_the_node_is_told(shared, pair):
    ash, _ = pair
    copy = Node(shared, "copy")
    copied(ash.home, copy.home)
    options = ("--home", copy.home, "--json", "--device", "cpu", "--listen", "127.0.0.1:0")
    _, complaint = shared.call("barnraise", "start", *options, code=Code.IDENTITY_TAKEN.exit.value)
    assert Code.IDENTITY_TAKEN.code in complaint and "is in use since" in complaint
    until(lambda: "another process with this node's key" in ash.status()["trouble"], "the node is told")
    ash.reaches(contributes(ash, ash.status()["round"]))


def test_a_banned_node_ends_with_the_reason_and_comes_back_only_once_it_may(shared, run):
    cedar, peers = Node(shared, "cedar"), ("barnraise-coordinator", "peers", "--run", run.folder)
    cedar.join(run.invite("--uses", "1"))
    until(cedar.status, "it is up")
    tree = cedar.tree()
    said, origin = shared.call(*peers, "ban", "cedar", "--reason", "it sends noise")
    assert "✓ cedar is banned" in said and "came with invite" in origin
    assert cedar.process.wait(60) == Code.BANNED.exit.value
    assert "the researcher has excluded this node: it sends noise" in cedar.said()
    gone(tree)
    cedar.start()
    assert cedar.process.wait(60) == Code.BANNED.exit.value
    shared.call(*peers, "unban", "cedar")
    cedar.start()
    until(cedar.status, "it is up again")
    cedar.stop()


LIAR = """
from node.pseudograd import PseudoGradient

encode = PseudoGradient.encode

def encode_with_nan(self):
    encode(self)
    self.payload = b"\\x00\\x7e" + self.payload[2:]

PseudoGradient.encode = encode_with_nan

from node.cli import main

main()
"""


def test_a_node_that_sends_what_no_codec_reads_is_struck_told_and_left_out(shared, run, pair, monkeypatch):
    liar, invite = Node(shared, "dogwood"), run.invite("--uses", "1")
    monkeypatch.setattr(shared, "program", lambda name, log: [sys.executable, "-c", LIAR])
    liar.join(invite)
    monkeypatch.undo()
    (node,) = until(lambda: {mark.node for mark in run.marks() if mark.fault}, "it is struck")
    until(lambda: "nobody can read its update" in liar.status()["trouble"], "it is told why")
    until(lambda: node not in run.members(), "it is left out")
    pair[0].reaches(pair[0].status()["round"] + 2)
    assert {mark.node for mark in run.marks() if mark.fault} == {node}, "nobody else is struck"
    liar.stop()


# people


def test_a_node_that_was_asked_to_finish_brings_its_work_and_ends(run, pair):
    ash, birch = pair
    birch.tell("finish")
    assert birch.process.wait(PATIENCE_SECONDS) == 0
    last = birch.last_words()
    assert last["activity"] == "stopped" and last["recent"][-1]["outcome"] == "accepted"
    ash.reaches(last["round"] + 1)
    until(lambda: len(run.members()) == 1, "the roster has one node")


def test_leave_with_purge_removes_the_files_and_keeps_the_key(pair):
    ash, _ = pair
    out, _ = ash.tell("leave", "--purge")
    assert ash.process.wait(PATIENCE_SECONDS) == 0 and "freed" in out
    assert sorted(path.name for path in ash.home.iterdir()) == [".barnraise", "node.key", "transport.key"]


def test_nothing_is_left_of_all_this(shared, run):
    assert run.stop() == 130
    shared.nothing_is_left()


# the demo


@pytest.mark.parametrize(("order", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_demo_that_is_ended_leaves_no_process(world, order, code):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited, as by the background jobs of a script
    demo = world.command("barnraise", "demo", "--nodes", "1", "--no-browser", "--json", log="demo")
    signal.signal(signal.SIGINT, before)
    until(
        lambda: demo.poll() is not None or [each for each in world.family() if "node.trainer" in words_of(each)],
        "its node has a trainer",
    )
    assert demo.poll() is None, world.log("demo").read_text()
    family = world.family()
    demo.send_signal(order)
    assert demo.wait(PATIENCE_SECONDS) == code
    gone(family)
    if order is signal.SIGINT:
        world.nothing_is_left()
    assert not world.family()
