"""A run that goes back, a coordinator that is away at a start, a disk that is older than it says: with real processes."""

import shutil

import pytest

from node.config import Home
from protocol.types import Exchange
from tests.e2e.processes import TEXT, TINY, Node, Run, World, gone, until

SETTINGS = {
    "rounds": {**TINY["rounds"], "inner_steps": [[1, 8]]},
    "update": {"codec": "sparse2", "residual_decay": 0.95},  # so every record here is of an all-gather
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("rollback") / "world")
    yield world
    world.close()


@pytest.fixture(scope="module")
def run(shared):
    run = Run(shared, settings=SETTINGS)
    run.add(*TEXT)
    run.start()
    return run


@pytest.fixture(scope="module")
def nodes(shared, run):
    invite = run.invite("--uses", "3")
    nodes = [Node(shared, name) for name in ("ash", "birch", "cedar")]
    for node in nodes:
        node.join(invite)
    for node in nodes:
        node.reaches(2)
    return nodes


def rollbacks(run):
    store = run.store()
    try:
        return store.rollbacks(), store.undone()
    finally:
        store.close()


def brings(run, node, start):
    """Wait until a record of the line, of this round or a later one, holds something of the node."""
    me = until(lambda: node.status().get("node"), f"{node.name} answers")

    def found():
        later = [entry for entry in run.entries() if entry.record.round >= start]
        return any(c.node.startswith(me) for entry in later for c in entry.record.contributions)

    until(found, f"{node.name} brings something to a round from {start} on")


def test_a_rollback_is_followed_by_every_node_and_both_branches_stay_visible(shared, run, nodes):
    for node in nodes:
        node.reaches(7)
    assert {entry.record.exchange for entry in run.entries()} == {Exchange.ALL_GATHER}
    before = run.entries()
    out, _ = shared.call("barnraise-coordinator", "rollback", run.folder, "--to", "5", "--reason", "a test", "--yes")
    assert "5" in out
    (signed,), undone = rollbacks(run)
    assert signed.rollback.to.round == 5 and {number for number, _ in undone} == {1}
    assert [entry for _, entry in undone][: len(before) - 5] == list(before[5:])
    for node in nodes:
        until(lambda node=node: "round 5" in node.status()["trouble"], f"{node.name} says what happened")
    for node in nodes:
        brings(run, node, 5)
    entries = run.entries()
    assert entries[:5] == before[:5] and entries[5].record != before[5].record
    states = {entry.record.round: entry.record.state for entry in entries}
    assert states[5] == before[5].record.state, "the very bits that the run was at"
    shared.call("barnraise-coordinator", "ledger", "verify", "--run", run.folder, "--deep")


def test_a_node_starts_again_while_the_coordinator_is_away(run, nodes):
    ash, birch, cedar = nodes
    run.kill()
    gone(birch.kill())
    birch.start()
    until(lambda: birch.status().get("round"), "it has its state")
    assert not birch.status()["linked"]
    start = birch.status()["round"]
    until(
        lambda: [row for row in birch.status()["recent"] if row["outcome"] == "accepted"],
        "a round has taken something of it, without a coordinator",
    )
    ash.reaches(start + 2)
    run.start()
    until(lambda: birch.status()["linked"], "the coordinator is back")
    brings(run, birch, max(node.status()["round"] for node in nodes))


@pytest.fixture(scope="module")
def backups(nodes):
    """Copies of two of three homes as they are now; both nodes go on."""
    others = nodes[1:]
    for node in others:
        assert node.stop() == 130
    backups = {node.name: node.world.folder / f"{node.name}-backup" for node in others}
    for node in others:
        shutil.copytree(node.home, backups[node.name], symlinks=True, ignore=shutil.ignore_patterns("runtime"))
        node.start()
    for node in others:
        node.rostered()
    return backups


def put_back(node, backup):
    """It dies, and its disk is the one of then."""
    gone(node.kill())
    shutil.rmtree(node.home)
    shutil.copytree(backup, node.home, symlinks=True)
    (node.home / "runtime").mkdir(mode=0o700, exist_ok=True)


@pytest.mark.long
def test_a_node_whose_disk_came_from_a_backup_begins_as_a_new_member_would(run, nodes, backups):
    ash, birch, cedar = nodes
    brings(run, cedar, cedar.status()["round"])
    known = rollbacks(run)[0]
    put_back(cedar, backups[cedar.name])
    cedar.start()
    until(lambda: run.page("status") and "older disk" in str(run.page("status")["events"]), "the coordinator notices")
    until(lambda: list(Home(cedar.home).journal.glob("*/silence.json")), "it promises to sign under newer rosters only")
    brings(run, cedar, max(node.status()["round"] for node in (ash, birch)))
    assert rollbacks(run)[0] == known


@pytest.mark.long
def test_when_a_majority_has_older_disks_everybody_goes_on_on_another_branch(run, nodes, backups):
    """One of the disks comes back a second time: what it promised meanwhile is gone as well."""
    ash, *others = nodes
    known = len(rollbacks(run)[0])
    for node in others:
        brings(run, node, node.status()["round"])
    for node in others:
        put_back(node, backups[node.name])
    for node in others:
        node.start()
    until(lambda: len(rollbacks(run)[0]) > known, "the coordinator begins another branch")
    assert "forgot" in rollbacks(run)[0][known].rollback.reason
    for node in nodes:
        brings(run, node, ash.status()["round"])


def test_nothing_is_left_of_all_this(shared, run, nodes):
    for node in nodes:
        assert node.stop() == 130
    shared.call("barnraise-coordinator", "ledger", "verify", "--run", run.folder)
    assert run.stop() == 130
    shared.nothing_is_left()
