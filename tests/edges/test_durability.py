"""A coordinator that dies anywhere: killed between any two effects, on a full disk, over a torn database.

The real machine, engine, database and blobs. Only the network is left out: nodes are lists of signed values.
"""

import asyncio
import os
import pickle
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from _pytest.monkeypatch import MonkeyPatch
from sqlalchemy import event

from coordinator import archive
from coordinator import store as store_module
from coordinator.core import leases as data
from coordinator.core import machine
from coordinator.core.leases import Leases
from coordinator.engine import Coordinator
from coordinator.folder import OURS, Published, RunFolder
from coordinator.ingest import Corpus, Skipped
from coordinator.store import Store, StoredNode, backup_of
from protocol import blobs, canonical, contribution, identity
from protocol.blobs import BlobStore
from protocol.codec import codec
from protocol.errors import Code, Refused
from protocol.fold import fold, outer_of
from protocol.identity import Key, peer_id_of
from protocol.limits import BLOB_CHUNK_BYTES
from protocol.log import VOTE, genesis_head, next_head, ranges_of, record_hash, vote_bytes
from protocol.state import initial_state, write_base
from protocol.types import (
    Ballot,
    BaseCheckpoint,
    BlobRef,
    Certificate,
    Contribution,
    Grant,
    Head,
    LogEntry,
    Manifest,
    Part,
    Pass,
    Record,
    Rollback,
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

    def certify(self, coordinator, after=None, packed=None):
        """The next record: each node uses half of a lease. `after` is one that the coordinator does not know yet,
        `packed` what its part is."""
        state, spec = coordinator.state, coordinator._spec
        head, replica = state.head, deepcopy(coordinator._replica)
        if after is not None:
            head = next_head(after.record)
            fold(replica, after.record, {0: self.part(after)}, coordinator._packing, coordinator._outer)
        values = np.random.default_rng(int(head.hash[:8], 16)).standard_normal(PARAMETERS).astype(np.float32)
        packed = packed or codec(spec.update.codec).encode(values)
        nodes = state.roster.roster.nodes
        held = [state.leases.of(node)[0 if after is None else -1].range for node in nodes]
        used = [replace(each, stop=(each.start + each.stop + 1) // 2) for each in held]
        run, epoch = coordinator.manifest.manifest.run, state.roster.roster.epoch
        given = tuple(self.brings(coordinator, node, span, head) for node, span in zip(nodes, used, strict=True))
        part = Part(0, 0, PARAMETERS, blobs.digest_of(packed), len(packed), nodes[0], nodes)
        record = Record(run, head.round, head.hash, epoch, nodes[0], given, (part,), replica.digest())
        body = vote_bytes(VoteBody(run, record.round, Ballot(epoch, 0), record_hash(record)))
        votes = tuple(Signature(key.public, key.sign(VOTE, body)) for key in KEYS if key.public in nodes)
        entry = LogEntry(record, Certificate(record_hash(record), Ballot(epoch, 0), votes))
        (self.folder / part.digest).write_bytes(packed)
        (self.folder / f"{len(self.entries()):04d}.entry").write_bytes(canonical.to_bytes(entry))
        return entry

    def brings(self, coordinator, node, span, head):
        run = coordinator.manifest.manifest.run
        grant = Grant(span, contribution.sign_grant(coordinator.key, run, node, span))
        told = Contribution(node, 32 * (span.stop - span.start), (span,), (grant,), "22" * 32)
        key = next(key for key in KEYS if key.public == node)
        return contribution.sign(key, run, head.round, head.hash, told)


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
                await asyncio.sleep(0.0005)

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
        await self.see(*(self.beat(key) for key in keys), machine.Ticked())

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
        await self.lease()
        await self.bring(self.nodes.certify(self.coordinator))

    async def two_rounds_out_of_order(self):
        await self.lease()
        first = self.nodes.certify(self.coordinator)
        second = self.nodes.certify(self.coordinator, after=first)
        await self.bring(second, first)

    async def lease(self):
        for node in self.state.roster.roster.nodes:
            await self.see(machine.LeasesAsked(node, 6))

    async def roll_back(self, to):
        await self.see(machine.RollbackAsked(self.coordinator._record_head(to), "the loss rose"))
        self.now += 1.0
        await self.see(*(self.beat(key) for key in KEYS), machine.Ticked())

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
    manifest = Manifest(
        folder.run_id(),
        "test",
        spec.to_json(),
        "{}",
        None,
        256,
        PARAMETERS,
        "ab" * 32,
        genesis,
        32,
        1,
        canonical.digest(SHARDS),
        "5.0",
    )
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
    """A short life with everything in it: rounds, two that arrive at once, checkpoints, a leaver, a rollback."""
    async with Desk(path, nodes) as desk:
        await desk.join()
        await desk.round()
        await desk.two_rounds_out_of_order()
        await desk.leave(KEYS[2])
        await desk.round()
        await desk.roll_back(3)
        await desk.round()
        await desk.round()


# a life that ends


class Steps:
    """Counts what a process does to its disk, and may die before one of those steps.

    Nothing waits for the disk: what a killed process has written, the kernel has."""

    def __init__(self, monkeypatch, dies_before=None, seen=None):
        self.count, self.dies_before, self.seen = 0, dies_before, seen
        move = Path.replace
        monkeypatch.setattr(os, "fsync", lambda _: self.step())
        monkeypatch.setattr(Path, "replace", lambda path, target: (self.step(), move(path, target))[1])
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


def alone(act, *paths):
    """Run it in a new process, which may fork: this one has threads of gRPC's that would hang a child."""
    code = f"from tests.edges.test_durability import {act.__name__} as act; act(*map(Path, sys.argv[1:]))"
    program = [sys.executable, "-c", f"import sys; from pathlib import Path; {code}", *paths]
    return subprocess.run(program, cwd=Path(__file__).parents[2]).returncode


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
    assert alone(killed_before_every_step, begun, tmp_path) == 0


def killed_before_every_step(begun, folder):
    def place(name):
        shutil.copytree(begun, folder / name)
        return folder / name, Nodes(folder / f"{name}-nodes")

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


async def test_a_coordinator_that_cannot_write_decides_nothing_rather_than_say_what_its_disk_does_not(
    begun, tmp_path, monkeypatch
):
    path = shutil.copytree(begun, tmp_path / "run")
    nodes = Nodes(tmp_path / "nodes")
    async with Desk(path, nodes) as desk:
        await desk.join()
        await desk.lease()
        entry = nodes.certify(desk.coordinator)

        def full(*_):
            raise Refused(Code.DISK_CAP, "no room")

        monkeypatch.setattr(desk.store, "append_entry", full)
        for asked in (machine.EntryArrived(entry), machine.Ticked()):
            with pytest.raises(Refused, match="the coordinator cannot write to its disk"):
                desk.coordinator.submit(asked)
        assert desk.coordinator._ended.exception().reason is Code.DISK_CAP
    monkeypatch.undo()
    async with Desk(path, nodes) as desk:
        assert desk.state.head.round == 0
        await desk.join()
        assert desk.state.head.round == 1, "its nodes bring it again"


async def test_what_a_rollback_undoes_leaves_no_checkpoint_behind(begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "run")
    async with Desk(path, Nodes(tmp_path / "nodes")) as desk:
        await desk.join()
        for _ in range(4):
            await desk.round()
        beyond = [base for base in desk.store.bases() if base.round > 2]
        await desk.roll_back(2)
        assert beyond and not any(desk.blobs.has(base.blob.digest) for base in beyond)
        assert all(desk.blobs.has(base.blob.digest) for base in desk.store.bases())


async def test_a_record_that_nobody_can_fold_holds_the_archive_until_a_rollback(begun, tmp_path):
    """A majority has certified it. Started again, the coordinator says the same, and the researcher can go back."""
    path, nodes = shutil.copytree(begun, tmp_path / "run"), Nodes(tmp_path / "nodes")

    def told(desk):
        return [text for _, text in desk.state.events if "record 1 is certified and cannot be folded" in text]

    async with Desk(path, nodes) as desk:
        await desk.join()
        await desk.round()
        followed = desk.coordinator._replica.digest()
        await desk.lease()
        await desk.bring(nodes.certify(desk.coordinator, packed=b"\xff" * len(nodes.part(nodes.entries()[0]))))
        assert len(told(desk)) == 1 and "barnraise-coordinator rollback --to 1" in told(desk)[0]
    async with Desk(path, nodes) as desk:
        assert desk.coordinator._replica.digest() == followed
        await desk.join()
        assert desk.state.head.round == 2 and len(told(desk)) == 2
        await desk.roll_back(1)
        await desk.round()
        assert (desk.state.head.round, desk.coordinator._replica.round) == (2, 2)


async def test_a_running_coordinator_obeys_its_watch(begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "run")
    async with Desk(path, Nodes(tmp_path / "nodes")) as desk:
        await desk.join()
        for _ in range(3):
            await desk.round()
        for number, loss in ((1, 2.5), (2, 2.4), (3, float("nan"))):
            desk.coordinator._heed(number, loss)
        assert (desk.state.head.round, desk.state.branch) == (2, 1)
        assert "not a number" in desk.state.rollbacks[0].rollback.reason


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 8 * 3600.0, -40 * 365 * 86400.0])
async def test_a_jump_of_the_wall_clock_changes_nothing_for_a_running_coordinator(begun, tmp_path, monkeypatch, jump):
    path = shutil.copytree(begun, tmp_path / "run")
    async with Desk(path, Nodes(tmp_path / "nodes")) as desk:
        del desk.coordinator._now  # its own clock, not the test's
        before, real = desk.coordinator.now_ms(), time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        assert 0 <= desk.coordinator.now_ms() - before < 60_000


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


# a torn database


NODE = KEYS[0].public


def everything(store):
    """All that a coordinator reads of its database, asked of it as it does."""
    return (
        store.entries(),
        store.undone(),
        store.rollbacks(),
        store.rosters(),
        store.nodes(),
        store.load_leases(SHARDS),
        store.shards(),
        store.bases(),
        store.history(),
        store.invites(),
        store.silent(),
        store.open_orders(),
        store.recent(1 << 20),
        store.get("manifest"),
    )


def written(path, told):
    """A process that fills a database and dies in the middle: half in the file, half in the write-ahead log."""
    store = Store(path)
    told(everything(store))
    peer = peer_id_of(KEYS[0].public_bytes)
    owner = KEYS[1]
    run = identity.run_id(owner.public, "test")
    leases = Leases(SHARDS)
    store.save_node(
        StoredNode(NODE, peer, "otter", None, identity.sign_pass(owner, Pass(run, NODE, peer, "otter", 5, 99)), 5)
    )
    told(everything(store))
    store.set("manifest", bytes(range(256)) * 64)
    told(everything(store))
    head = Head(0, "00" * 32)
    for number in range(8):
        leases, granted = data.grant(leases, NODE, sequences=4, largest=2, until_ms=9)
        store.save_leases(leases)
        told(everything(store))
        used = granted[0].range
        leases = data.consume(leases, [used])
        part = Part(0, 0, 64, f"{number:064x}", 36, NODE, (NODE,))
        record = Record(run, number, head.hash, 0, NODE, (Contribution(NODE, 64, (used,)),), (part,), "11" * 32)
        head = next_head(record)
        votes = tuple(Signature(NODE, "ab" * 64) for _ in range(16))
        store.append_entry(LogEntry(record, Certificate(head.hash, Ballot(0, 0), votes)), {NODE: 64}, leases)
        told(everything(store))
        store.save_base(BaseCheckpoint(number, head.hash, "11" * 32, BlobRef("22" * 32, 99)))
        told(everything(store))
        if number == 4:
            with sqlite3.connect(path) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.close()
    os.kill(os.getpid(), signal.SIGKILL)


def written_until_killed(folder):
    with (folder / "told").open("wb") as file:
        written(folder / "run" / "coordinator.db", lambda facts: (pickle.dump(facts, file), file.flush()))


@pytest.fixture(scope="module")
def died(tmp_path_factory):
    """The files of a coordinator that was killed, and everything that it had ever committed."""
    folder = tmp_path_factory.mktemp("torn")
    assert alone(written_until_killed, folder) == -signal.SIGKILL
    told = []
    with (folder / "told").open("rb") as file, suppress(EOFError):
        while True:
            told.append(pickle.load(file))
    return folder / "run", told


def wal_of(path):
    return path.with_name(path.name + "-wal")


def overwrite(path, start, noise):
    with path.open("r+b") as file:
        file.seek(start)
        file.write(noise)


def shortened(path, share):
    os.truncate(path, int(path.stat().st_size * share))


def noise(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


WAL_FRAME = 24 + 4096
DAMAGE = {
    "nothing": lambda db: None,
    "log deleted": lambda db: wal_of(db).unlink(),
    "log emptied": lambda db: os.truncate(wal_of(db), 0),
    "log without its header": lambda db: overwrite(wal_of(db), 0, noise(32)),
    "log with a tail of noise": lambda db: overwrite(wal_of(db), wal_of(db).stat().st_size, noise(9000)),
    "index of the log is noise": lambda db: overwrite(db.with_name(db.name + "-shm"), 0, noise(32768)),
    "file emptied": lambda db: os.truncate(db, 0),
    "file deleted": lambda db: db.unlink(),
    "file without its header": lambda db: overwrite(db, 0, noise(100)),
    **{
        f"log cut at {percent} %": (lambda db, percent=percent: shortened(wal_of(db), percent / 100))
        for percent in range(3, 100, 6)
    },
    **{
        f"log half a page of noise at {percent} %": (
            lambda db, percent=percent: overwrite(
                wal_of(db), int(wal_of(db).stat().st_size * percent / 100), noise(2048, percent)
            )
        )
        for percent in range(3, 97, 12)
    },
    **{
        f"file cut at {percent} %": (lambda db, percent=percent: shortened(db, percent / 100))
        for percent in range(5, 100, 10)
    },
    "file cut by a byte": lambda db: os.truncate(db, db.stat().st_size - 1),
}


def outcome(path, told):
    """Which commit was found, or the refusal."""
    try:
        store = Store(path)
    except Refused as refused:
        return refused
    try:
        facts = everything(store)
        if told[-1][0] and facts[0] and not store.bases():
            return Refused(Code.STORE_BAD, "no first checkpoint")  # as RunFolder.publish says
        return told.index(facts)
    except Refused as refused:
        return refused
    finally:
        store.close()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_torn_database_is_what_was_committed_or_a_refusal(died, tmp_path, damage):
    folder, told = died
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "coordinator.db"
    damage(path)
    found = outcome(path, told)
    if isinstance(found, Refused):
        assert found.reason is Code.STORE_BAD
        assert damage is not DAMAGE["nothing"]
    elif damage in (DAMAGE["nothing"], DAMAGE["log with a tail of noise"], DAMAGE["index of the log is noise"]):
        assert found == len(told) - 1, "the last that was committed"


@pytest.mark.parametrize("content", ["noise", "zeros", "another page"])
@pytest.mark.parametrize("half", [0, 2048])
def test_half_a_page_of_another_content_is_never_believed(died, tmp_path, half, content):
    folder, told = died
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "coordinator.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    whole = path.read_bytes()
    pages = len(whole) // 4096
    refused = []
    for page in range(pages):
        start = 4096 * page + half
        other = 4096 * ((page + 1) % pages) + half
        new = {"noise": noise(2048, page), "zeros": bytes(2048), "another page": whole[other : other + 2048]}[content]
        path.write_bytes(whole[:start] + new + whole[start + 2048 :])
        for extra in ("-wal", "-shm"):
            path.with_name(path.name + extra).unlink(missing_ok=True)
        found = outcome(path, told)
        refused.append(isinstance(found, Refused))
        if isinstance(found, Refused):
            assert found.reason is Code.STORE_BAD, f"page {page}: {found}"
        else:
            assert found == len(told) - 1, f"page {page}"
    assert sum(refused) > pages // 2


def test_a_refusal_names_the_backup(died, tmp_path):
    folder, told = died
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "coordinator.db"
    store = Store(path)
    assert outcome(path, told) == len(told) - 1
    store.backup()
    store.close()
    overwrite(path, 0, noise(4096))
    found = outcome(path, told)
    assert isinstance(found, Refused)
    assert str(backup_of(path)) in found.fix
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)
    found = outcome(path, told)
    assert isinstance(found, Refused), "a run that had a database does not begin afresh without it"
    assert str(backup_of(path)) in found.fix
    shutil.copy(backup_of(path), path)
    assert outcome(path, told) == len(told) - 1


def test_a_rotten_database_does_not_replace_its_backup(died, tmp_path):
    folder, told = died
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "coordinator.db"
    store = Store(path)
    store.backup()
    good = backup_of(path).read_bytes()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    for page in range(1, path.stat().st_size // 4096):
        overwrite(path, 4096 * page, noise(1024, page))
    with pytest.raises(Refused) as caught:
        store.backup()
    assert caught.value.reason is Code.STORE_BAD
    assert backup_of(path).read_bytes() == good
    assert not list(path.parent.glob(".new-*"))
    store.close()


# a full disk


@contextmanager
def files_of_at_most(size):
    """A disk that is full, as far as one process can have one of its own: no file may grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores SIGXFSZ: a write fails with EFBIG
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def pages_of_at_most(store, pages):
    with store._reading() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")


def fills(store):
    """Each write that grows with the run, as (name, call)."""
    run = identity.run_id(KEYS[1].public, "test")
    leases, _ = data.grant(store.load_leases(SHARDS), NODE, sequences=400, largest=2, until_ms=9)
    last = store.entries()[-1].record
    part = Part(0, 0, 64, "fe" * 32, 36, NODE, (NODE,))
    given = Contribution(NODE, 64, (leases.of(NODE)[0].range,))
    record = Record(run, last.round + 1, record_hash(last), 0, NODE, (given,), (part,), "11" * 32)
    votes = tuple(Signature(NODE, "ab" * 64) for _ in range(64))
    entry = LogEntry(record, Certificate(record_hash(record), Ballot(0, 0), votes))
    rollback = Rollback(run, 1, Head(0, "00" * 32), Head(8, record_hash(last)), "x" * 9000, 9)
    return {
        "a record": lambda: store.append_entry(entry, {NODE: 64}, leases),
        "leases": lambda: store.save_leases(leases),
        "a rollback": lambda: store.save_rollback(identity.sign_rollback(KEYS[1], rollback), leases),
        "a value": lambda: store.set("manifest", noise(9000)),
        "a line": lambda: store.say(5, "x" * 9000),
    }


@pytest.mark.parametrize("limit", ["pages", "files"])
@pytest.mark.parametrize("name", ["a record", "leases", "a rollback", "a value", "a line"])
def test_a_full_disk_is_a_refusal_that_changes_nothing(died, tmp_path, name, limit):
    folder, told = died
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "coordinator.db"
    store = Store(path)
    with sqlite3.connect(path) as connection:
        connection.execute("VACUUM")  # no free pages to write into
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    write = fills(store)[name]
    if limit == "pages":
        pages_of_at_most(store, 1)  # as many as it has
        with pytest.raises(Refused) as caught:
            write()
        pages_of_at_most(store, 1 << 30)
    else:
        with files_of_at_most(2048), pytest.raises(Refused) as caught:
            write()
    assert caught.value.reason is Code.DISK_CAP
    assert "disk" in caught.value.fix and "--max-disk" not in caught.value.fix
    assert told.index(everything(store)) == len(told) - 1, "nothing was changed"
    write()
    store.close()
    store = Store(path)
    assert everything(store) not in told
    store.close()


def test_a_backup_that_finds_no_room_leaves_the_one_before(died, tmp_path):
    folder, _ = died
    shutil.copytree(folder, tmp_path / "run")
    store = Store(tmp_path / "run" / "coordinator.db")
    store.backup()
    good = backup_of(store.path).read_bytes()
    with files_of_at_most(8192), pytest.raises(Refused) as caught:
        store.backup()
    assert caught.value.reason is Code.DISK_CAP
    assert backup_of(store.path).read_bytes() == good
    assert not list(store.path.parent.glob(".new-*"))
    store.backup()
    store.close()


READ_ONLY = """
import subprocess, sys
from pathlib import Path
from coordinator.store import Store
from protocol import blobs as module
from protocol.blobs import BlobStore
from protocol.errors import Code, Refused
module.DISK_FREE_BYTES_MIN = 0
folder = Path(sys.argv[1])
mount = lambda *words: subprocess.run(["mount", *words, str(folder)], check=True)
mount("-t", "tmpfs", "-o", "size=8m", "tmpfs")
store, blobs = Store(folder / "run" / "coordinator.db"), BlobStore(folder / "blobs")
store.set("a", b"1")
store.close()  # whom the kernel itself takes the disk from need not let go of it first, as we have to
mount("-o", "remount,ro")
for act in (lambda: store.set("a", b"2"), lambda: blobs.put_bytes(b"x"), lambda: Store(folder / "run" / "coordinator.db")):
    try:
        act()
    except Refused as refused:
        assert refused.reason is Code.DISK_BAD, refused
        assert "disk" in refused.fix
    else:
        raise AssertionError("it was written")
mount("-o", "remount,rw")
assert store.get("a") == b"1"
store.set("a", b"2")
"""


def test_a_disk_that_became_read_only_is_named_on_both_sides(tmp_path):
    inside = ["unshare", "-rm", sys.executable, "-c", READ_ONLY, str(tmp_path)]
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("no mounts in a namespace of one's own here")
    done = subprocess.run(
        inside, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_folders_name_may_hold_what_means_something_in_a_url(tmp_path):
    for name in ("what?mode=ro", "a#b", "50%25", "sp ace", "ünï"):
        path = tmp_path / name / "coordinator.db"
        Store(path).close()
        store = Store(path)
        store.set("a", b"1")
        store.backup()
        store.close()
        assert {each.name for each in path.parent.iterdir()} >= {"coordinator.db", "coordinator.backup.db"}
    assert len(list(tmp_path.iterdir())) == 5


def test_a_full_disk_keeps_no_half_of_a_blob(tmp_path):
    fix = "Free some space."
    store = BlobStore(tmp_path / "blobs", full_fix=fix)
    whole = noise(3 * BLOB_CHUNK_BYTES + 5)
    digest = blobs.digest_of(whole)
    (tmp_path / "file").write_bytes(whole)

    def received():
        with store.writer(digest, len(whole)) as writer:
            writer.write(whole)
            return writer.finish()

    for put in (lambda: store.put_bytes(whole), lambda: store.put_file(tmp_path / "file"), received):
        for room in (0, 1000, BLOB_CHUNK_BYTES + 1, len(whole) - 1):
            with files_of_at_most(room), pytest.raises(Refused) as caught:
                put()
            assert (caught.value.reason, caught.value.fix) == (Code.DISK_CAP, fix)
            assert [path for path in store.folder.rglob("*") if path.is_file()] == []
            assert store.bytes_used == 0
        assert put().digest == digest
        store.verify(digest)
        store.delete(digest)


# a coordinator that is back


async def test_what_is_measured_at_the_start_has_the_tokens_of_its_own_rounds(tmp_path, monkeypatch):
    """Nodes bring a record while the rendezvous still starts: it is folded at any moment from then on."""
    folded, measured = threading.Event(), threading.Event()

    def fold_and_dawdle(*arguments):
        fold(*arguments)
        folded.set()
        measured.wait(20.0)

    async with Desk(begin(tmp_path / "run"), Nodes(tmp_path / "nodes")) as desk:
        await desk.join()
        await desk.round()
        await desk.lease()
        desk.slow.cancel()  # as before a start: nothing slow is carried out yet, and nothing is to be measured
        desk.coordinator._to_measure.clear()
        desk.coordinator._measure.clear()
        coordinator, entry = desk.coordinator, desk.nodes.certify(desk.coordinator)
        desk.blobs.put_bytes(desk.nodes.part(entry))
        coordinator.submit(machine.EntryArrived(entry))
        coordinator.submit(machine.PartStored(entry.record.parts[0].digest))
        monkeypatch.setattr("coordinator.engine.fold", fold_and_dawdle)
        coordinator._tell_rendezvous = lambda: asyncio.to_thread(folded.wait, 20.0)
        coordinator._evaluate = asyncio.Event().wait
        stopper = SimpleNamespace(polite=asyncio.Event())
        running = asyncio.create_task(coordinator.run(stopper))
        try:
            async with asyncio.timeout(20.0):
                await asyncio.to_thread(folded.wait, 20.0)
                await coordinator._measure.wait()
            facts = coordinator._to_measure[0][1]
        finally:
            measured.set()
            stopper.polite.set()
            await running
            for task in coordinator._tasks:
                task.cancel()
        taken = [each for entry in desk.store.entries()[: facts.round] for each in entry.record.contributions]
    assert facts.tokens == sum(each.tokens for each in taken) > 0
