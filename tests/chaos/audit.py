"""What must be true after any fault, checked from the coordinator's folder, the nodes' words and the file system."""

import re
import time
from contextlib import contextmanager
from itertools import pairwise

from coordinator.archive import rebuild
from coordinator.folder import RunFolder
from protocol.log import ranges_of, record_hash
from tests.e2e.processes import until

FOLDED = re.compile(r' event="round folded" round=(\d+) .* state=(\w+)')
PATIENCE_SECONDS = 20.0  # a range may be held and consumed at once for the moment between two transactions


@contextmanager
def opened(run):
    store = RunFolder(run.folder).open_store()
    try:
        yield store
    finally:
        store.close()


def log_of(run):
    """The hashes of all records that the coordinator has, undone ones included."""
    with opened(run) as store:
        entries = [*store.entries(), *(entry for _, entry in store.undone())]
    return {record_hash(entry.record) for entry in entries}


def ranges(run):
    """Sequences that nobody has any more, and sequences that two have: all data up to the cursor is somewhere once."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        lost, doubled = _ranges(run)
        if (not lost and not doubled) or time.monotonic() > end:
            return lost, doubled
        time.sleep(0.2)


def _ranges(run):
    with opened(run) as store:
        shards = store.shards()
        leases = store.load_leases(shards)
        consumed = [span for entry in store.entries() for span in ranges_of(entry.record)]
        spans = [*consumed, *leases.returned, *(lease.range for lease in leases.held.values())]
        granted = {}  # of each shard in each pass, what has ever left the cursor
        for number in range(leases.cursor.pass_number + 1):
            for index, shard in enumerate(shards):
                done = number < leases.cursor.pass_number or index < leases.cursor.shard
                here = leases.cursor.start if index == leases.cursor.shard else 0
                granted[number, shard.digest] = shard.sequences if done else here
    lost = doubled = 0
    for key, size in granted.items():
        mine = [(span.start, span.stop) for span in spans if (span.pass_number, span.shard) == key]
        edges = sorted({0, size, *(edge for span in mine for edge in span)})
        for start, stop in pairwise(edges):
            holders = sum(low <= start and stop <= high for low, high in mine)
            lost += (stop - start) * (holders == 0 and stop <= size)
            doubled += (stop - start) * (holders > 1)
    return lost, doubled


def archived(run):
    """The state digest after each record of the log, by its hash: the last is what the archive alone folds up to."""
    folder = RunFolder(run.folder)
    with opened(run) as store:
        state = rebuild(store, folder.open_blobs(), folder.manifest(store).manifest)
        entries = store.entries()
    assert state.round == len(entries), f"the archive reaches round {state.round} of {len(entries)}"
    states = [*(entry.record.state for entry in entries[1:]), state.digest()]
    return {record_hash(entry.record): digest for entry, digest in zip(entries, states, strict=True)}


def ledger(run):
    """What `barnraise-coordinator ledger verify` says: chain, certificates, credit, data, and every fold again."""
    out, _ = run.world.call("barnraise-coordinator", "ledger", "verify", "--deep", "--run", run.folder)
    return out.strip()


def losses(run):
    """Held-out loss over the rounds."""
    with opened(run) as store:
        return [(row.round, row.heldout) for row in store.history()]


def everything(swarm, members):
    """After the last fault: one state everywhere, a whole log, and nothing left. What was found wrong, in words."""
    wrong, facts = [], {}

    def holds(what, check):
        try:
            return check()
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__} {error}"[:2500])
            return None

    for member in members:
        holds(f"{member.name} pauses", lambda member=member: member.status()["trains"] and member.tell("pause"))
    heads = holds("every replica is the same", lambda: until(swarm.agreed, "every replica is at the same head"))
    facts["heads"] = swarm.heads() if heads is None else {"all": heads}
    facts["sequences lost"], facts["sequences doubled"] = holds("ranges", lambda: ranges(swarm.coordinator)) or (-1, -1)
    for member in members:  # what each still has to bring may make rounds of its own
        holds(f"{member.name} ends", lambda member=member: _ended(member.stop(), member.name))
    strange, facts["folds compared"] = holds("folds", lambda: strange_folds(swarm.coordinator, members)) or ((), "?")
    wrong += [f"{name} folded round {number} to {state}, which no record names" for name, number, state in strange]
    holds("the coordinator ends", lambda: _ended(swarm.coordinator.stop(), "coordinator"))
    states = holds("the archive", lambda: archived(swarm.coordinator)) or {}
    for member in members:
        head = member.last_words()["head"]
        if states.get(head["hash"]) != head["state"]:
            wrong.append(f"{member.name} ended at {head}, the archive folds to {states.get(head['hash'])}")
    facts["ledger verify"] = holds("ledger verify", lambda: ledger(swarm.coordinator))
    missing = holds("every certified round is in the log", lambda: missing_rounds(swarm))
    facts["rounds lost"] = missing
    if missing:
        wrong.append(f"rounds {missing} were certified and are not in the log")
    if facts["sequences lost"] or facts["sequences doubled"]:
        wrong.append(f"{facts['sequences lost']} sequences lost, {facts['sequences doubled']} doubled")
    wrong += [f"two contents of one round: {each}" for each in swarm.watch.conflicts]
    clean = holds("no process, socket or temporary file is left", lambda: nothing_is_left(swarm.arena) or True)
    facts["left behind"] = "no process, socket or temporary file" if clean else "see below"
    facts["rounds certified"] = len(swarm.watch.in_order())
    facts["losses"] = holds("losses", lambda: losses(swarm.coordinator)) or []
    return wrong, facts


def strange_folds(run, members):
    """States that a node logged after a fold and that the log does not have after that round, on any branch; and how
    many were looked up there."""
    with opened(run) as store:
        records = [entry.record for entry in (*store.entries(), *(entry for _, entry in store.undone()))]
        ends = {signed.rollback.undone.round for signed in store.rollbacks()}  # no record names the state there
    states = {}
    for record in records:
        states.setdefault(record.round, set()).add(record.state)
    found, compared = [], 0
    for member in members:
        for line in (member.home / "logs" / "node.log").read_text().splitlines():
            if match := FOLDED.search(line):
                number, state = int(match[1]) + 1, match[2]
                known = any(each.startswith(state) for each in states.get(number, ()))
                compared += number in states
                if not known and number in states and number not in ends:
                    found.append((member.name, number - 1, state))
    return found, compared


def missing_rounds(swarm):
    """Rounds that some node has seen certified and that the coordinator has not, or has otherwise."""
    kept = log_of(swarm.coordinator)
    return [each.round for each in swarm.watch.in_order() if each.hash not in kept]


def nothing_is_left(arena):
    arena.nothing_is_left()
    left = [path for path in arena.folder.rglob("*") if path.name.startswith(".new-") or path.suffix == ".sock"]
    assert not left, f"left: {[str(path.relative_to(arena.folder)) for path in left]}"


def _ended(code, name):
    assert code == 130, f"{name} ended with {code}"
