"""The archive: real blobs and a real database, a line that turns, and files that rot."""

from dataclasses import replace

import numpy as np
import pytest
from structlog.testing import capture_logs

from coordinator import archive
from coordinator.core.leases import Leases
from coordinator.store import Store
from protocol import identity, runspec
from protocol.blobs import BlobStore
from protocol.errors import Code, Refused
from protocol.exchange import packing_of
from protocol.fold import fold, outer_of
from protocol.identity import Key
from protocol.log import genesis_head, head_after, line_head, next_head
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
    Record,
    Rollback,
)

OWNER = Key.generate()
RUN = identity.run_id(OWNER.public, "test")
NODE = "cc" * 32
PARAMETERS = 3000


class Line:
    """A run as its coordinator's folder has it, and every state it ever had by the digest of its head."""

    def __init__(self, folder):
        folder.mkdir()
        (folder / "run.toml").write_text(runspec.template("test"))
        spec = runspec.load(folder / "run.toml")
        self.outer, self.packing = outer_of(spec.update), packing_of(spec.update)
        self.store, self.blobs = Store(folder / "coordinator.db"), BlobStore(folder / "blobs")
        self.folder = folder
        self.state = initial_state(np.zeros(PARAMETERS, np.float32), momentum=self.outer.keeps_momentum)
        self.manifest = Manifest(
            RUN,
            "test",
            spec.to_json(),
            "{}",
            None,
            256,
            PARAMETERS,
            "aa" * 32,
            self.state.digest(),
            32,
            1,
            "dd" * 32,
            "5.0",
        )
        self.head, self.branch = genesis_head(self.manifest), 0
        self.records = [self.head]  # the line's heads, none of them a rollback's
        self.digests = [self.state.digest()]
        self.keep_base()

    def grow(self, rounds, *, bases=()):
        for _ in range(rounds):
            record, data = self.next_record()
            self.store.append_entry(LogEntry(record, Certificate(next_head(record).hash, Ballot(0, 0), ())), {})
            fold(self.state, record, {0: data}, self.packing, self.outer)
            self.head = next_head(record)
            self.records.append(self.head)
            self.digests.append(self.state.digest())
            if self.head.round in bases:
                self.keep_base()
        return self

    def next_record(self):
        number = self.head.round
        seed = int(self.head.hash[:8], 16)
        data = self.packing.up.encode(np.random.default_rng(seed).standard_normal(PARAMETERS).astype(np.float32))
        ref = self.blobs.put_bytes(data)
        part = Part(0, 0, PARAMETERS, ref.digest, ref.size, NODE, (NODE,))
        used = Contribution(NODE, 320, (DataRange(0, "aa" * 32, 10 * number, 10 * number + 10),))
        return Record(RUN, number, self.head.hash, 0, NODE, (used,), (part,), self.digests[-1]), data

    def roll_back(self, to):
        known = self.store.rollbacks()
        rollback = Rollback(RUN, len(known) + 1, self.records[to], self.head, "the loss rose", 9)
        self.store.save_rollback(identity.sign_rollback(OWNER, rollback), Leases(()))
        self.head, self.branch = head_after(rollback), rollback.number
        del self.records[to + 1 :], self.digests[to + 1 :]
        self.state = self.rebuilt()
        return self

    def keep_base(self):
        path = self.folder / "base"
        digest = write_base(path, self.state)
        base = BaseCheckpoint(self.head.round, self.head.hash, digest, self.blobs.put_file(path), self.branch)
        self.store.save_base(base)

    def base_path(self):
        return self.blobs.path(self.store.newest_base().blob.digest)

    def rebuilt(self, round_number=None):
        return archive.rebuild(self.store, self.blobs, self.manifest, round_number)

    def check(self):
        for number, digest in enumerate(self.digests):
            assert self.rebuilt(number).digest() == digest
        assert self.rebuilt().digest() == self.digests[-1]


@pytest.fixture
def line(tmp_path):
    line = Line(tmp_path / "run")
    yield line
    line.store.close()


def refused(act, *arguments):
    with pytest.raises(Refused) as caught:
        act(*arguments)
    return caught.value


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


# the line


def test_the_line_goes_on_with_the_branch_where_a_rollback_turns_it(line):
    line.grow(5, bases=(3, 5))
    undone = line.digests[4]
    line.roll_back(3).grow(3, bases=(6,))
    assert line.digests[4] != undone
    line.check()
    line.roll_back(2).grow(1).roll_back(3).grow(2)
    assert [number for number, _ in line.store.undone()] == [1, 1, 2, 2, 2, 2]
    line.check()


@pytest.mark.parametrize("rebuilt_from", [(), (2,), (4,)])
def test_a_checkpoint_where_the_line_turns_leads_to_the_branch(line, rebuilt_from):
    line.grow(6, bases=rebuilt_from).roll_back(4)
    line.check()
    line.roll_back(4).grow(1)  # turned twice in one place
    line.check()


def test_a_checkpoint_made_just_after_a_turn_leads_on(line):
    line.grow(4).roll_back(2).keep_base()
    assert line.store.newest_base().branch == 1
    for entry in line.store.entries():
        line.blobs.delete(entry.record.parts[0].digest)  # only the checkpoint leads to round 2 now
    line.grow(2)
    assert line.rebuilt().digest() == line.digests[-1]
    line.roll_back(2).grow(2)
    assert line.rebuilt().digest() == line.digests[-1]


def test_a_rollback_to_the_beginning_leaves_the_first_state(line):
    line.grow(3, bases=(2,)).roll_back(0)
    assert line.rebuilt().digest() == line.manifest.genesis
    line.grow(2)
    line.check()


def test_a_record_that_does_not_follow_the_head_is_refused(line):
    line.grow(2)
    record, _ = line.next_record()
    stray = replace(record, previous=line.records[1].hash)
    line.store.append_entry(LogEntry(stray, Certificate(next_head(stray).hash, Ballot(0, 0), ())), {})
    refusal = refused(line.rebuilt)
    assert refusal.reason is Code.STATE_MISMATCH
    assert f"record 2 follows {line.records[1].hash[:12]}" in refusal.what


def test_a_record_of_an_undone_branch_is_refused_after_the_turn(line):
    line.grow(3)
    line.roll_back(2)
    before, _ = line_head(line.records[2], ())
    line.head = before  # as if no rollback were known
    record, _ = line.next_record()
    record = replace(record, leader="dd" * 32)  # the undone one itself is in the database already
    line.store.append_entry(LogEntry(record, Certificate(next_head(record).hash, Ballot(0, 0), ())), {})
    assert refused(line.rebuilt).reason is Code.STATE_MISMATCH


# rot


def gone(path):
    path.unlink()


def torn(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flipped_in_the_values(path):
    flip(path, -50)


def flipped_in_the_header(path):
    data = path.read_bytes()
    path.write_bytes(
        data.replace(b'"momentum"' if b'"momentum"' in data else b'"params"', b'"Params"  ', 1)[: len(data)]
    )


def padded_otherwise(path):
    """The state in it is right, and yet nobody could download it: the file's own hash differs."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b",", b", ", 1)
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


@pytest.mark.parametrize(
    "rot", [gone, torn, empty, flipped_in_the_values, flipped_in_the_header, padded_otherwise], ids=lambda r: r.__name__
)
@pytest.mark.parametrize("turns", [False, True])
def test_a_rotten_newest_checkpoint_is_quarantined_and_made_again_to_the_same_bytes(line, rot, turns):
    line.grow(4, bases=(2, 4))
    if turns:
        line.roll_back(3).grow(2, bases=(5,)).roll_back(5)
    line.grow(1)
    base, path, whole = line.store.newest_base(), line.base_path(), line.base_path().read_bytes()
    rot(path)
    rotten = path.read_bytes() if path.exists() else None
    line.blobs = BlobStore(line.blobs.folder)  # found at the next start
    with capture_logs() as said:
        assert line.rebuilt().digest() == line.digests[-1]
    assert path.read_bytes() == whole
    again = line.store.newest_base()
    assert (again.round, again.state, again.blob) == (base.round, base.state, base.blob)
    aside = line.blobs.folder / archive.QUARANTINE / base.blob.digest
    assert (aside.read_bytes() if aside.exists() else None) == rotten
    assert [each["moved"] for each in said if "moved" in each] == [str(aside) if rotten is not None else None]
    with capture_logs() as said:
        line.check()
        assert line.rebuilt().digest() == line.digests[-1]
    assert said == [], "it is whole again"
    assert BlobStore(line.blobs.folder).bytes_used == line.blobs.bytes_used


def test_all_rotten_checkpoints_but_the_first_are_made_again(line):
    line.grow(5, bases=(1, 3, 5))
    files = {base.blob.digest: line.blobs.path(base.blob.digest).read_bytes() for base in line.store.bases()}
    for base in line.store.bases()[1:]:
        flip(line.blobs.path(base.blob.digest), -1)
    assert line.rebuilt().digest() == line.digests[-1]
    assert [base.round for base in line.store.bases()] == [0, 1, 3, 5]
    assert {digest: line.blobs.path(digest).read_bytes() for digest in files} == files


def test_a_checkpoint_that_cannot_be_made_again_is_promised_to_nobody(line):
    line.grow(4, bases=(4,))
    flip(line.base_path(), -1)
    line.blobs.delete(line.store.entries(1, 1)[0].record.parts[0].digest)
    assert line.rebuilt().digest() == line.digests[1]
    assert line.store.newest_base().round == 0
    assert line.blobs.has(line.store.newest_base().blob.digest)


def test_a_checkpoint_of_another_line_is_not_believed(line):
    line.grow(3, bases=(3,))
    other = line.store.newest_base()
    line.roll_back(2).grow(2)
    line.store.save_base(replace(other, branch=1))
    assert line.rebuilt().digest() == line.digests[-1]
    assert line.store.newest_base().state == line.digests[3]


def test_without_any_whole_checkpoint_nothing_is_made_up(line):
    line.grow(2)
    flip(line.base_path(), -1)
    refusal = refused(line.rebuilt)
    assert refusal.reason is Code.BLOB_CORRUPT
    assert "backup" in refusal.fix
    assert refused(line.rebuilt).reason is Code.BLOB_MISSING
    assert [base.round for base in line.store.bases()] == [0], "a copy of it may be put back"


def test_a_rotten_part_makes_room_for_one_that_a_member_sends(line):
    line.grow(3)
    part = line.store.entries(1, 1)[0].record.parts[0].digest
    data = line.blobs.read(part)
    flip(line.blobs.path(part), 5)
    with capture_logs() as said:
        assert line.rebuilt().digest() == line.digests[1]
    assert not line.blobs.has(part), "nobody would be asked for it again"
    assert (line.blobs.folder / archive.QUARANTINE / part).exists()
    assert "round 1" in said[0]["event"]
    assert refused(line.rebuilt, 3).reason is Code.BLOB_MISSING
    line.blobs.put_bytes(data)
    line.check()
