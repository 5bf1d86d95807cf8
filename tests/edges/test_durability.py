"""A coordinator that dies anywhere: killed between any two effects, on a full disk, over a torn database.

The real machine, engine, database and blobs. Only the network is left out: nodes are lists of signed values.
"""

import asyncio
import os
import shutil
import signal
import sqlite3
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import event

from coordinator import archive
from coordinator import store as store_module
from coordinator.core import machine
from coordinator.engine import Coordinator
from coordinator.folder import OURS, Published, RunFolder
from coordinator.ingest import Corpus, Skipped
from coordinator.store import Store, StoredNode
from protocol import blobs, canonical, identity
from protocol.blobs import BlobStore
from protocol.codec import codec
from protocol.fold import outer_of
from protocol.identity import Key, peer_id_of
from protocol.log import VOTE, genesis_head, ranges_of, record_hash, vote_bytes
from protocol.state import initial_state, write_base
from protocol.types import (
    Ballot,
    BaseCheckpoint,
    Certificate,
    Contribution,
    DataRange,
    LogEntry,
    Manifest,
    Part,
    Pass,
    Record,
    Shard,
    Signature,
    VoteBody,
)

KEYS = tuple(Key.generate() for _ in range(3))
SHARDS = (Shard("aa" * 32, 2048, 1024, 32), Shard("bb" * 32, 1024, 512, 16))
HELD = Shard("dd" * 32, 64, 32, 2)
PARAMETERS = 500
RUN_FILE = """
[run]
name = "test"
min_nodes = 2
rounds = 0
[model]
architecture = "llama"
[model.config]
[data]
context = 32
[evaluate]
base_every_rounds = 2
"""


# a coordinator and its nodes


class Nodes:
    """What the nodes keep on disks of their own: each record they certified, and its part. They outlive everybody."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def entries(self):
        return [canonical.from_bytes(LogEntry, path.read_bytes()) for path in sorted(self.folder.glob("*.entry"))]

    def part(self, entry):
        return (self.folder / entry.record.parts[0].digest).read_bytes()

    def certify(self, coordinator, previous=None):
        """The next record after this head: each node uses half of its first lease."""
        state, spec = coordinator.state, coordinator._spec
        head = previous or state.head
        values = np.random.default_rng(int(head.hash[:8], 16)).standard_normal(PARAMETERS).astype(np.float32)
        packed = codec(spec.update.codec).encode(values)
        held = [state.leases.of(node)[-1 if previous else 0].range for node in state.roster.roster.nodes]
        used = [DataRange(r.pass_number, r.shard, r.start, (r.start + r.stop + 1) // 2) for r in held]
        nodes = state.roster.roster.nodes
        given = tuple(Contribution(node, 32 * (r.stop - r.start), (r,)) for node, r in zip(nodes, used, strict=True))
        part = Part(0, 0, PARAMETERS, blobs.digest_of(packed), len(packed), nodes[0], nodes)
        run, epoch = coordinator.manifest.manifest.run, state.roster.roster.epoch
        record = Record(run, head.round, head.hash, epoch, nodes[0], given, (part,), self.state_of(coordinator, head))
        body = vote_bytes(VoteBody(run, record.round, Ballot(epoch, 0), record_hash(record)))
        votes = tuple(Signature(key.public, key.sign(VOTE, body)) for key in KEYS if key.public in nodes)
        entry = LogEntry(record, Certificate(record_hash(record), Ballot(epoch, 0), votes))
        (self.folder / part.digest).write_bytes(packed)
        (self.folder / f"{len(self.entries()):04d}.entry").write_bytes(canonical.to_bytes(entry))
        return entry

    def state_of(self, coordinator, head):
        assert head == coordinator.state.replica
        return coordinator.state.replica_digest


class Desk:
    """One life of the coordinator, driven by hand."""

    def __init__(self, path, nodes):
        self.folder, self.nodes = RunFolder(path), nodes
        self.folder.prepare()
        self.folder._sweep()
        self.store, self.blobs = self.folder.open_store(), self.folder.open_blobs()
        self.coordinator = Coordinator(self.folder, self.store, self.blobs, published(self.folder, self.store))
        self.now = 1000.0 + 1000 * len(self.store.rosters())
        self.coordinator._now = lambda: self.now
        self.coordinator.state = self.coordinator._restore()
        self.slow = asyncio.create_task(self.coordinator._carry_out_slow())

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.slow.cancel()
        await asyncio.gather(self.slow, *self.coordinator._tasks, return_exceptions=True)
        self.store.close()

    @property
    def state(self):
        return self.coordinator.state

    async def see(self, *events):
        """Until all that follows is done."""
        for each in events:
            self.coordinator.submit(each)
            while self.coordinator._work.qsize() or not self.coordinator._work._getters:
                if self.slow.done():
                    self.slow.result()
                await asyncio.sleep(0)

    async def join(self, keys=KEYS):
        """The nodes come, wait until a restarted coordinator gives out rosters, and bring what it has lost."""
        for key in keys:
            peer = peer_id_of(key.public_bytes)
            signed = identity.sign_pass(
                self.coordinator.key, Pass(self.folder.run_id(), key.public, peer, "otter", 5, 10**15)
            )
            self.store.save_node(StoredNode(key.public, peer, "otter", None, signed, 5))
            await self.see(machine.NodeOpened(key.public, peer, "otter", ()))
        for entry in self.nodes.entries():
            await self.bring(entry)
        for _ in range(2):
            await self.see(*(self.beat(key) for key in keys))
            self.now += 29.0
        await self.see(*(self.beat(key) for key in keys))

    def beat(self, key):
        ids = tuple(lease.lease_id for lease in self.state.leases.of(key.public))
        return machine.HeartbeatArrived(
            key.public, "training", self.state.head.round, 0, (), branch=self.state.branch, lease_ids=ids
        )

    async def bring(self, *entries):
        for entry in entries:
            self.blobs.put_bytes(self.nodes.part(entry))
            await self.see(machine.EntryArrived(entry), machine.PartStored(entry.record.parts[0].digest))

    async def round(self):
        for node in self.state.roster.roster.nodes:
            await self.see(machine.LeasesAsked(node, 6))
        await self.bring(self.nodes.certify(self.coordinator))

    async def roll_back(self, to):
        await self.see(machine.RollbackAsked(self.coordinator._record_head(to), "the loss rose"))
        self.now += 1.0
        await self.see(*(self.beat(key) for key in KEYS))

    async def leave(self, key):
        await self.see(machine.NodeLeft(key.public, "asked", None))


def begin(path):
    """A run that was published, and never started."""
    path.mkdir()
    (path / "run.toml").write_text(RUN_FILE)
    folder = RunFolder(path)
    folder.prepare()
    spec = folder.spec()
    state = initial_state(np.zeros(PARAMETERS, np.float32), momentum=outer_of(spec.update).keeps_momentum)
    genesis = write_base(path / "base", state)
    base = folder.open_blobs().put_file(path / "base")
    manifest = Manifest(folder.run_id(), "test", spec.to_json(), "{}", None, 256, PARAMETERS, "ab" * 32, genesis, 32, 1)
    store = folder.open_store()
    store.save_shards(SHARDS, HELD)
    store.save_base(BaseCheckpoint(0, genesis_head(manifest).hash, genesis, base))
    store.set("manifest", canonical.to_bytes(identity.sign_manifest(folder.key(), manifest)))
    store.close()
    return path


def published(folder, store):
    corpus = Corpus(SHARDS, HELD, 3, 1, 1536, Skipped(), None, 256, 1, 32)
    return Published(folder.manifest(store), next(base for base in store.bases() if base.round == 0), corpus)


async def live(path, nodes):
    """A short life with everything in it: rounds, checkpoints, a node that leaves, a rollback, and more rounds."""
    async with Desk(path, nodes) as desk:
        await desk.join()
        for _ in range(3):
            await desk.round()
        await desk.leave(KEYS[2])
        await desk.round()
        await desk.roll_back(3)
        for _ in range(2):
            await desk.round()


# a life that ends


class Steps:
    """Counts what a process does to its disk, and may die before one of those steps.

    Nothing waits for the disk: what a killed process has written, the kernel has."""

    def __init__(self, monkeypatch, dies_before=None, seen=None):
        self.count, self.dies_before, self.seen = 0, dies_before, seen
        replace = Path.replace
        monkeypatch.setattr(os, "fsync", lambda _: self.step())
        monkeypatch.setattr(Path, "replace", lambda path, target: (self.step(), replace(path, target))[1])
        make_engine = store_module._engine

        def counted(path):
            engine = make_engine(path)
            event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
            event.listen(engine, "commit", lambda _: self.step())
            return engine

        monkeypatch.setattr(store_module, "_engine", counted)

    def step(self):
        if self.seen is not None:
            self.seen(self.count)
        if self.count == self.dies_before:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def dies(act):
    """Run it in a child; how that ended."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        act()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def contents(path):
    """Every row of a database."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1")]
    rows = {table: sorted(connection.execute(f"SELECT * FROM {table}"), key=repr) for table in tables}
    connection.close()
    return rows


def check(store, blob_store, manifest):
    """What must be true of every database that a coordinator starts with."""
    line, undone = store.entries(), [entry for _, entry in store.undone()]
    credit = {node.node: 0 for node in store.nodes()}
    for entry in (*line, *undone):
        for each in entry.record.contributions:
            credit[each.node] += each.tokens
    assert {node.node: node.credit_tokens for node in store.nodes()} == credit
    check_ranges_once(store.load_leases(SHARDS), line)
    reached = archive.rebuild(store, blob_store, manifest)
    assert reached.round <= len(line)
    for base in store.bases():
        blob_store.verify(base.blob.digest)


def check_ranges_once(leases, line):
    """Each sequence is consumed, held, to be granted again, or was never granted: one of them."""
    used = [span for entry in line for span in ranges_of(entry.record)]
    touched = (*used, *leases.returned, *(lease.range for lease in leases.held.values()))
    for passed in range(leases.cursor.pass_number + 1):
        for place, shard in enumerate(SHARDS):
            counts = np.zeros(shard.sequences, int)
            for span in touched:
                if (span.pass_number, span.shard) == (passed, shard.digest):
                    counts[span.start : span.stop] += 1
            at = (leases.cursor.pass_number, leases.cursor.shard)
            granted = shard.sequences if (passed, place) < at else leases.cursor.start if (passed, place) == at else 0
            assert (counts[:granted] == 1).all(), f"pass {passed} of {shard.digest[:4]}: {counts}"
            assert not counts[granted:].any()
    assert all(span.pass_number <= leases.cursor.pass_number for span in touched)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    return begin(tmp_path_factory.mktemp("durability") / "run")


def test_a_coordinator_killed_before_any_step_goes_on_from_what_it_had_committed(begun, tmp_path):
    from _pytest.monkeypatch import MonkeyPatch

    def place(name):
        shutil.copytree(begun, tmp_path / name)
        return tmp_path / name, Nodes(tmp_path / f"{name}-nodes")

    whole, nodes = place("whole")
    committed = []  # what the database holds before each step
    with MonkeyPatch.context() as patched:
        steps = Steps(patched, seen=lambda _: committed.append(contents(whole / OURS / "coordinator.db")))
        asyncio.run(live(whole, nodes))
    assert steps.count > 60
    print(f"{steps.count} steps")
    store = Store(whole / OURS / "coordinator.db")
    assert (store.entry_count, len(store.undone()), len(store.rollbacks())) == (5, 1, 1)
    manifest = RunFolder(whole).manifest(store).manifest
    store.close()

    for number in range(steps.count):
        path, nodes = place(f"dies-{number}")

        def life(path=path, nodes=nodes, number=number):
            with MonkeyPatch.context() as patched:
                Steps(patched, dies_before=number)
                asyncio.run(live(path, nodes))

        ended = dies(life)
        assert os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL, f"step {number}: {ended}"
        known = contents(path / OURS / "coordinator.db")
        assert known == committed[number], f"step {number}: a mixture"
        store = Store(path / OURS / "coordinator.db")
        check(store, BlobStore(path / OURS / "blobs"), manifest)
        store.close()
        with MonkeyPatch.context() as patched:
            Steps(patched)
            asyncio.run(goes_on(path, nodes, manifest))
        shutil.rmtree(path)


async def goes_on(path, nodes, manifest):
    """The next life loses nothing that nodes had certified, and trains on."""
    async with Desk(path, nodes) as desk:
        await desk.join()
        archived = {record_hash(entry.record) for _, entry in desk.store.undone()}
        archived |= {record_hash(entry.record) for entry in desk.store.entries()}
        assert archived >= {record_hash(entry.record) for entry in nodes.entries()}
        before = desk.state.head.round
        await desk.round()
        await desk.round()
        assert desk.state.head.round == before + 2
        assert desk.state.replica == desk.state.head
        check(desk.store, desk.blobs, manifest)
        left = [each.name for each in (path / OURS).rglob(".new-*")]
        assert len(left) <= 1, "a file that was being written is swept when it is old"
