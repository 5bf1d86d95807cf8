"""A node's copy of the state, from real files: what a coordinator or a majority forged is found before it is kept."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from node.daemon import is_less
from node.journal import Journal
from node.replica import Replica
from protocol.blobs import BlobStore, digest_of
from protocol.codec import codec
from protocol.errors import Code, Exit, Refused
from protocol.exchange import Packing
from protocol.fold import Outer
from protocol.limits import CHUNK_VALUES
from protocol.log import genesis_head, next_head
from protocol.state import Consumed, State, write_base
from protocol.types import (
    Ballot,
    BaseCheckpoint,
    BlobRef,
    Certificate,
    Contribution,
    DataRange,
    Digest,
    Head,
    LogEntry,
    Manifest,
    NodeId,
    Part,
    Record,
)

PACKING = Packing(codec("int4"), codec("int4"))
ASH = NodeId("ash")
VALUES = np.linspace(-1, 1, CHUNK_VALUES, dtype=np.float32)
ZERO = Digest("00" * 32)


class Stand:
    """A replica, and a run of which it knows the first state."""

    def __init__(self, folder):
        self.folder = folder
        self.truth = State(0, np.zeros(CHUNK_VALUES, np.float32), None)
        genesis = self.truth.digest()
        self.manifest = Manifest("run", "run", "{}", "{}", None, 256, CHUNK_VALUES, ZERO, genesis, 16, 2, ZERO, "5.0")
        self.blobs, self.journal = BlobStore(folder / "blobs"), Journal(folder / "journal")
        self.replica = Replica(
            self.manifest,
            journal=self.journal,
            blobs=self.blobs,
            vectors=SimpleNamespace(shared=np.empty(CHUNK_VALUES, np.float32)),
            packing=PACKING,
            outer=Outer(),
        )

    def base(self, state, head=None):
        """What a coordinator may announce, and the file that goes with it: of the same digest."""
        path = self.folder / "base"
        head = genesis_head(self.manifest).hash if head is None else head
        return BaseCheckpoint(state.round, head, write_base(path, state), BlobRef(ZERO, path.stat().st_size)), path

    def entry(self, data, **changes):
        part = Part(0, 0, CHUNK_VALUES, self.blobs.put_bytes(data).digest, len(data), ASH, (ASH,))
        told = Contribution(ASH, 16, ())
        record = Record("run", 0, genesis_head(self.manifest).hash, 0, ASH, (told,), (part,), self.manifest.genesis)
        return LogEntry(replace(record, **changes), Certificate(ZERO, Ballot(0, 0), ()))


@pytest.fixture
def stand(tmp_path):
    return Stand(tmp_path)


def refused(call, *arguments):
    with pytest.raises(Refused) as caught:
        call(*arguments)
    return caught.value


def test_a_forged_base_checkpoint_is_found_out_by_the_next_record(stand):
    """The coordinator names base checkpoints unsigned, and the file fits the name: the members' record does not."""
    forged = replace(stand.truth, params=VALUES.copy())
    stand.replica.load(*stand.base(forged))
    refusal = refused(stand.replica.fold, stand.entry(codec("int4").encode(VALUES)))
    assert (refusal.reason, refusal.reason.exit) == (Code.STATE_MISMATCH, Exit.INTEGRITY)
    assert stand.replica.head == genesis_head(stand.manifest) and stand.journal.entry(0) is None


def test_used_data_cannot_be_forged_either(stand):
    """It is part of the state: who believed it would leave data out, or train it twice."""
    forged = replace(stand.truth, consumed=Consumed().with_ranges([DataRange(0, "11" * 32, 0, 9)]))
    stand.replica.load(*stand.base(forged))
    assert refused(stand.replica.fold, stand.entry(codec("int4").encode(VALUES))).reason is Code.STATE_MISMATCH


def test_a_file_of_another_state_or_round_than_was_named_is_refused(stand):
    base, path = stand.base(stand.truth)
    assert refused(stand.replica.load, replace(base, state=Digest("11" * 32)), path).reason is Code.STATE_MISMATCH
    assert refused(stand.replica.load, replace(base, round=3), path).reason is Code.STATE_MISMATCH
    assert stand.replica.head is None


def test_a_record_that_cannot_be_folded_is_not_kept_whoever_certified_it(stand):
    """Kept, it would end each later start as well."""
    stand.replica.load(*stand.base(stand.truth))
    broken = bytearray(codec("int4").encode(VALUES))
    broken[:2] = b"\xff\xff"  # a scale that is no number
    before = stand.replica.digest
    refusal = refused(stand.replica.fold, stand.entry(bytes(broken)))
    assert refusal.reason is Code.UPDATE_BAD and "record 0 is certified" in refusal.what
    assert stand.journal.entry(0) is None and stand.replica.state.digest() == before
    good = stand.entry(codec("int4").encode(VALUES))
    stand.replica.fold(good)
    assert stand.journal.entry(0) == good and stand.replica.head == next_head(good.record)


@pytest.mark.parametrize(("round_number", "less"), [(9, False), (10, False), (12, False), (14, True)])
def test_nobody_is_taken_back_by_an_old_base_checkpoint(round_number, less):
    base = BaseCheckpoint(round_number, ZERO, ZERO, BlobRef(ZERO, 3_000))
    assert is_less(base, Head(10, ZERO), 1_000) is less


def test_used_data_in_too_many_pieces_is_a_refusal_that_leaves_the_checkpoint_before(stand, monkeypatch):
    stand.replica.load(*stand.base(stand.truth))
    stand.replica.save_base()
    kept = stand.journal.base()
    shard = digest_of(b"shard")
    stand.replica.state.consumed = Consumed({(0, shard): tuple(range(4_000))})
    monkeypatch.setattr("protocol.state.BASE_HEADER_BYTES_MAX", 4_096)
    refusal = refused(stand.replica.save_base)
    assert refusal.reason is Code.LIMIT and refusal.what.startswith("2,000 pieces")
    assert stand.journal.base() == kept
    assert sorted(path.name for path in stand.journal.folder.glob("base-*")) == [f"base-{kept.state[:16]}.safetensors"]
