"""The courier with an engine made of a few lines: nothing is waited for past the stated time."""

import asyncio
import hashlib
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import structlog

from node import courier as courier_module
from node import letters
from node.core.rounds import Rounds
from node.courier import EVIDENCE_KEPT, Courier
from node.decider import Decider
from node.engine import AveragingOutcome
from node.journal import Journal
from protocol.blobs import BlobStore, digest_of
from protocol.codec import codec
from protocol.errors import Code, Refused
from protocol.evidence import Slice, check_slice, group_id, is_vouched
from protocol.exchange import Packing
from protocol.identity import Key, run_id, sign_rollback, sign_roster
from protocol.limits import CHUNK_VALUES, LOG_ROSTERS_MAX, PEER_MESSAGE_BYTES_MAX, ROLLBACKS_MAX
from protocol.messages import Begin, LogReply, LogRequest, Ready, SignedReady
from protocol.state import Consumed
from protocol.types import (
    Ballot,
    Certificate,
    Contribution,
    Digest,
    Head,
    LogEntry,
    Member,
    NodeId,
    Part,
    PeerId,
    Record,
    Role,
    Rollback,
    Roster,
    SignedRoster,
)

ME, *OTHERS = (NodeId(name) for name in ("me", "ash", "birch", "cedar"))
HEAD = Head(0, Digest("00" * 32))
VALUES = 4 * CHUNK_VALUES
MEMBERS = tuple(Member(node, PeerId(f"peer of {node}"), (), 10**6) for node in (ME, *OTHERS))
ROSTER = Roster("run", 0, MEMBERS, 0)
KEY = Key.generate()
LONG_SECONDS = 600.0  # if a test waited for it, the suite would be stopped


class Engine:
    """Peers that keep blobs, and peers that are stopped."""

    def __init__(self):
        self.blobs = {}
        self.stopped = set()
        self.asked = []
        self.sent = []
        self.under_way = self.most_at_once = 0
        self.together = asyncio.Event()
        self.together.set()

    async def average(self, job, payload):
        self.job = job
        await asyncio.sleep(LONG_SECONDS)

    async def send(self, peer, letter, *, timeout_seconds):
        self.sent.append((peer, letter))

    async def fetch_part(self, peer, digest, size, *, timeout_seconds):
        self.asked.append(peer)
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            await self.together.wait()
            if peer in self.stopped:
                await asyncio.sleep(LONG_SECONDS)
            if (peer, digest) not in self.blobs:
                raise Refused(Code.UNREACHABLE, "sent nothing")
            return self.blobs[peer, digest]
        finally:
            self.under_way -= 1


class Stand:
    def __init__(self, folder, archive=None, packing=None, journal=None, *, me=ME, roster=ROSTER):
        decider = Decider(None, lambda effect: None)
        rosters = {0: SignedRoster(roster, "s")}
        decider.begin(Rounds(head=HEAD, digest=Digest("11" * 32), consumed=Consumed(), rosters=rosters))
        self.blobs = BlobStore(folder)
        self.engine = Engine()
        self.courier = Courier(
            SimpleNamespace(parameters=VALUES, run="run"),
            me,
            packing=packing or Packing(codec("int4"), codec("int4")),
            journal=journal or Journal(folder.parent / "journal"),
            blobs=self.blobs,
            make_room=lambda: None,
            link=SimpleNamespace(fetch_blob=archive or self._nothing),
            decider=decider,
            key=KEY,
        )
        self.courier.engine = self.engine

    async def _nothing(self, ref, store):
        raise Refused(Code.UNREACHABLE, "the coordinator is away")

    @staticmethod
    def data(index):
        return codec("int4").encode(np.full(CHUNK_VALUES, index + 1, np.float32))

    def part(self, index, *, of=OTHERS[0], at=()):
        data = self.data(index)
        for node in at:
            self.engine.blobs[PeerId(f"peer of {node}"), digest_of(data)] = data
        start = index * CHUNK_VALUES
        return Part(index, start, start + CHUNK_VALUES, digest_of(data), len(data), of, (ME,))


@pytest.fixture
def stand(tmp_path):
    return Stand(tmp_path / "blobs")


def begin():
    ready = Ready("run", 0, HEAD.hash, Ballot(0, 0), ME, Contribution(ME, 16, ()), None)
    others = (
        SignedReady(Ready("run", 0, HEAD.hash, Ballot(0, 0), n, Contribution(n, 16, ()), None), "") for n in OTHERS
    )
    return Begin("run", 0, Ballot(0, 0), OTHERS[0], (SignedReady(ready, ""), *others))


# letters

ASH, BIRCH, OAK = (Key.generate() for _ in range(3))


def peer_of(key):
    return PeerId(f"peer of {key.public[:4]}")


def with_clients(folder, me, *clients):
    """One of three members, of whom some cannot be called."""
    roles = {key.public: Role.CLIENT for key in clients}
    members = (Member(k.public, peer_of(k), (), 1, roles.get(k.public, Role.PEER)) for k in (ASH, BIRCH, OAK))
    return Stand(folder, me=me.public, roster=Roster("run", 0, tuple(members), 0))


def letter_of(key):
    return letters.seal(key, LogRequest("run", 0, key.public))[0]


async def test_a_letter_between_two_that_nobody_can_call_goes_by_way_of_a_third(tmp_path):
    ash, oak, birch = (with_clients(tmp_path / key.public[:4], key, ASH, BIRCH) for key in (ASH, OAK, BIRCH))
    await ash.courier.deliver(BIRCH.public, letter_of(ASH))
    ((carrier, letter),) = ash.engine.sent
    assert carrier == peer_of(OAK)
    assert oak.courier.open(peer_of(ASH), letter) is not None and oak.courier.onward(letter) == BIRCH.public
    await oak.courier.deliver(BIRCH.public, letter)
    assert oak.engine.sent == [(peer_of(BIRCH), letter)]
    message, _ = birch.courier.open(peer_of(OAK), letter)
    assert message == LogRequest("run", 0, ASH.public) and birch.courier.onward(letter) is None


async def test_whoever_can_be_called_is_called(tmp_path):
    for me, to, clients in ((ASH, OAK, (ASH, BIRCH)), (OAK, ASH, (ASH, BIRCH)), (ASH, BIRCH, ())):
        stand = with_clients(tmp_path / f"{me.public[:4]}{len(clients)}", me, *clients)
        await stand.courier.deliver(to.public, letter_of(me))
        assert stand.engine.sent == [(peer_of(to), letter_of(me))]


async def test_a_letter_that_anothers_peer_brings_is_refused(tmp_path):
    stand = with_clients(tmp_path, OAK)
    assert stand.courier.open(peer_of(BIRCH), letter_of(ASH)) is None
    assert stand.courier.open(peer_of(ASH), letter_of(ASH)) is not None
    for to in (OAK, BIRCH):  # all three can be called: nobody passes anything on
        carried = letters.addressed(letter_of(ASH), to.public)
        assert stand.courier.open(peer_of(BIRCH), carried) is None and stand.courier.onward(carried) is None


async def test_a_peer_whose_letters_are_refused_is_a_line_a_minute(tmp_path):
    stand = with_clients(tmp_path, OAK)
    with structlog.testing.capture_logs() as lines:
        for _ in range(100):
            assert stand.courier.open(peer_of(BIRCH), letter_of(ASH)) is None
            assert stand.courier.open(peer_of(ASH), b"not a letter") is None
    assert [line["peer"] for line in lines] == [peer_of(BIRCH)[-8:], peer_of(ASH)[-8:]]


async def test_nobody_passes_on_what_its_author_did_not_bring(tmp_path):
    stand = with_clients(tmp_path, OAK, ASH, BIRCH)
    carried = letters.addressed(letter_of(ASH), BIRCH.public)
    assert stand.courier.open(peer_of(BIRCH), carried) is None
    assert stand.courier.open(peer_of(ASH), carried[:-9]) is None


@pytest.mark.parametrize("more", [0, 1], ids=["as many as are told", "more"])
async def test_an_answer_about_the_log_is_read_up_to_its_bounds(tmp_path, more):
    stand, coordinator = with_clients(tmp_path, OAK), Key.generate()
    run = stand.courier._manifest.run = run_id(coordinator.public, "test")
    signed = sign_roster(coordinator, Roster(run, 7, (), 0))
    undone = sign_rollback(coordinator, Rollback(run, 1, HEAD, HEAD, "", 0))
    for rosters, rollbacks in ((LOG_ROSTERS_MAX + more, 0), (0, ROLLBACKS_MAX + more)):
        reply = LogReply(run, 0, ASH.public, (), (signed,) * rosters, (undone,) * rollbacks)
        assert (stand.courier.open(peer_of(ASH), letters.seal(ASH, reply)[0]) is None) == bool(more)


async def test_no_more_rosters_are_told_than_are_read_and_those_that_are_known_are_not_checked_again(tmp_path):
    run = run_id(Key.generate().public, "test")
    rosters = {epoch: SignedRoster(replace(ROSTER, epoch=epoch), "s") for epoch in range(LOG_ROSTERS_MAX + 5)}
    asked, asking = (with_clients(tmp_path / name, key) for name, key in (("oak", OAK), ("birch", BIRCH)))
    for stand in (asked, asking):
        stand.courier._manifest.run = run
        known = {**rosters, 0: stand.courier._rosters()[0]}
        stand.courier._decider.begin(replace(stand.courier._decider.rounds, rosters=known))
    reply = asked.courier.log_reply(LogRequest(run, 0, BIRCH.public))
    assert len(reply.rosters) == LOG_ROSTERS_MAX
    assert asking.courier.open(peer_of(OAK), letters.seal(OAK, reply)[0]) is not None


async def test_of_large_records_no_more_are_told_than_one_letter_holds_and_one_at_least(tmp_path):
    """64 members who each bring the data of forty leases make a record of a megabyte."""
    stand, told = with_clients(tmp_path / "blobs", OAK), []
    grants = "5" * 17_000  # as long as forty
    brought = tuple(Contribution(NodeId(f"{node:064x}"), 1, (), signature=grants) for node in range(64))
    for number in range(3):
        record = Record("run", number, HEAD.hash, 0, OAK.public, brought, (), HEAD.hash)
        stand.courier._journal.append(LogEntry(record, Certificate(HEAD.hash, Ballot(0, 0), ())))
    while reply := stand.courier.log_reply(LogRequest("run", len(told), BIRCH.public)).entries:
        letter, _ = letters.seal(OAK, stand.courier.log_reply(LogRequest("run", len(told), BIRCH.public)))
        assert PEER_MESSAGE_BYTES_MAX / 2 < len(letter) <= PEER_MESSAGE_BYTES_MAX
        told += reply
    assert [entry.record.round for entry in told] == [0, 1, 2]


# averaging


async def test_an_averaging_ends_in_its_time_even_if_the_engine_is_stopped(stand):
    began = time.monotonic()
    assert await stand.courier.average(begin(), ROSTER, b"", seconds=0.3) == (None, {}, frozenset())
    assert time.monotonic() - began < 30
    assert stand.engine.job.deadline_seconds < 0.3, "so that what is complete by then still comes"


async def test_what_an_averaging_completed_is_kept(stand):
    async def average(job, payload):
        start, stop = job.spans[1]
        data = bytes(codec("int4").encoded_bytes(stop - start))
        return AveragingOutcome({1: data}, (), {0: "x"}, 0.1, 0, 0, garbled=(2,))

    stand.engine.average = average
    part, held, garbled = await stand.courier.average(begin(), ROSTER, b"", seconds=5.0)
    assert part is None and set(held) == {1} and stand.blobs.has(held[1])
    assert garbled == {OTHERS[1]}


@pytest.mark.parametrize("down", ["sparse2", "int4"])
async def test_what_our_means_left_out_is_asked_for_when_the_last_record_took_them(tmp_path, down):
    """Of several attempts it took one, and later ones may take nothing of ours; of means by others nothing is left here."""
    folded = {}
    packing = Packing(codec("sparse2"), codec(down))
    journal = SimpleNamespace(entry=folded.get, folder=tmp_path)
    stand = Stand(tmp_path / "blobs", packing=packing, journal=journal)
    sent = iter(range(1, 9))

    async def average(job, payload):
        stand.engine.job, number = job, next(sent)
        size = packing.down.encoded_bytes(job.spans[0][1])
        return AveragingOutcome({0: bytes([number]) * size}, (0,), {}, 0.1, 0, 0)

    async def attempt(number, round_number=0):
        given = replace(begin(), round=round_number, ballot=Ballot(0, number))
        part, *_ = await stand.courier.average(given, ROSTER, b"x", seconds=5.0)
        return part, stand.engine.job

    def fold(part):
        folded[0] = SimpleNamespace(record=SimpleNamespace(parts=(part,)))

    stand.engine.average = average
    (first, first_job), (second, second_job) = [await attempt(number) for number in (0, 1)]
    assert first_job.after == second_job.after == b"" and first_job.group != second_job.group
    for taken, group in ((first, first_job.group), (second, second_job.group)):
        fold(taken)
        for round_number in (1, 2):
            _, job = await attempt(0, round_number)
            assert job.after == (group if down == "sparse2" else b"")
    for strange in (replace(first, reducer=OTHERS[0]), replace(first, digest=Digest("77" * 32))):
        fold(strange)
        _, job = await attempt(0, round_number=1)
        assert job.after == b""


async def test_a_part_of_ours_is_signed_with_what_it_was_made_of_and_so_is_each_slice_that_we_send(tmp_path):
    members = tuple(replace(member, node=KEY.public) if member.node == ME else member for member in MEMBERS)
    roster, packing = replace(ROSTER, members=members), Packing(codec("int4"), codec("int4"))
    stand = Stand(tmp_path / "blobs", me=KEY.public, roster=roster)
    payload = packing.up.encode(np.ones(VALUES, np.float32))

    async def average(job, _):
        stand.engine.job = job
        file = tmp_path / "evidence"
        file.write_bytes(bytes(2 * packing.up.encoded_bytes(CHUNK_VALUES) + 500))
        return AveragingOutcome({0: bytes(packing.down.encoded_bytes(CHUNK_VALUES))}, (0, 2), {}, 0.1, 0, 0, file)

    stand.engine.average = average
    given = begin()
    mine = replace(given.readies[0].ready, sender=KEY.public, contribution=Contribution(KEY.public, 16, ()))
    given = replace(given, readies=(SignedReady(mine, ""), *given.readies[1:]))
    part, *_ = await stand.courier.average(given, roster, payload, seconds=5.0)
    brought = tuple(signed.ready.contribution for signed in given.readies)
    record = Record("run", 0, HEAD.hash, 0, OTHERS[0], brought, (part,), "00" * 32)
    assert (
        is_vouched(record, part, packing)
        and len(stand.courier.evidence.read(part.evidence.digest)) == part.evidence.size
    )
    assert not is_vouched(replace(record, round=1), part, packing)
    job = stand.engine.job
    assert job.members == roster.nodes and job.group == group_id("run", HEAD.hash, 0, 0)
    for (start, stop), signature in zip(job.spans, job.signatures, strict=True):
        data = payload[packing.up.encoded_bytes(start) : packing.up.encoded_bytes(stop)]
        check_slice(KEY.public, Slice(job.group.hex(), start, stop, hashlib.sha256(data).hexdigest()), signature)


async def test_what_our_newest_means_were_made_of_is_kept_where_no_peer_can_ask_for_it(stand, tmp_path):
    made = []

    async def average(job, payload):
        file = tmp_path / "evidence"
        file.write_bytes(bytes([len(made)]) * 100)
        return AveragingOutcome({0: bytes(10)}, (0,), {}, 0.1, 0, 0, file)

    stand.engine.average = average
    for attempt in range(EVIDENCE_KEPT + 2):
        given = replace(begin(), ballot=Ballot(0, attempt))
        part, *_ = await stand.courier.average(given, ROSTER, b"x", seconds=5.0)
        made.append(part.evidence.digest)
        assert not (tmp_path / "evidence").exists()
    shown = [stand.courier.evidence.read(digest) for digest in made]
    assert shown == [None, None, *(bytes([number]) * 100 for number in range(2, EVIDENCE_KEPT + 2))]
    assert not set(made) & set(stand.blobs.digests())


# parts


async def test_a_part_comes_from_its_reducer_or_whoever_else_has_it(stand):
    for index, at in enumerate([OTHERS, OTHERS[1:], OTHERS[2:]]):
        part = stand.part(index, at=at)
        assert await stand.courier.fetch_part(part, OTHERS) and stand.blobs.has(part.digest)
    assert stand.engine.asked[0] == "peer of ash"


async def test_parts_are_fetched_side_by_side(stand):
    parts = [stand.part(index, of=OTHERS[index % 3], at=OTHERS) for index in range(4)]
    stand.engine.together.clear()
    tasks = [asyncio.create_task(stand.courier.fetch_part(part, OTHERS)) for part in parts]
    while stand.engine.under_way < len(parts):
        await asyncio.sleep(0)
    stand.engine.together.set()
    assert await asyncio.gather(*tasks) == [True] * 4


async def test_peers_are_not_asked_for_more_at_once_than_they_answer(stand, monkeypatch):
    parts = [stand.part(index, at=OTHERS) for index in range(30)]
    await asyncio.gather(*(stand.courier.fetch_part(part, OTHERS) for part in parts))
    assert stand.engine.most_at_once <= courier_module.PARTS_AT_ONCE


async def test_peers_and_a_coordinator_that_are_stopped_cost_a_part_no_more_than_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(courier_module, "PART_SECONDS", 0.1)
    monkeypatch.setattr(courier_module, "PART_BYTES_PER_SECOND_MIN", 1 << 30)

    async def stopped(ref, store):
        await asyncio.sleep(LONG_SECONDS)

    stand = Stand(tmp_path / "blobs", archive=stopped)
    stand.engine.stopped = {member.peer for member in MEMBERS}
    began = time.monotonic()
    assert not await stand.courier.fetch_part(stand.part(0, at=OTHERS), OTHERS)
    assert time.monotonic() - began < 30


async def test_two_orders_for_one_part_fetch_it_once(stand):
    part = stand.part(0, at=OTHERS[:1])
    assert await asyncio.gather(*(stand.courier.fetch_part(part, OTHERS) for _ in range(3))) == [True] * 3
    assert stand.engine.asked == ["peer of ash"]


async def test_the_archive_is_asked_when_no_peer_has_it(tmp_path):
    async def archive(ref, store):
        store.put_bytes(Stand.data(0))

    stand = Stand(tmp_path / "blobs", archive=archive)
    assert await stand.courier.fetch_part(stand.part(0), OTHERS)


async def test_bytes_of_another_hash_are_not_kept(stand):
    part = stand.part(1, at=OTHERS)
    stand.engine.blobs = dict.fromkeys(stand.engine.blobs, bytes(part.size))
    assert not await stand.courier.fetch_part(part, OTHERS)
    assert not stand.blobs.digests()


async def test_a_part_that_no_codec_reads_is_not_there_for_a_vote_whatever_its_hash(stand):
    data = b"\x00\x7e" + bytes(codec("int4").encoded_bytes(CHUNK_VALUES) - 2)  # its first scale is NaN
    part = replace(stand.part(0), digest=digest_of(data))
    for node in OTHERS:
        stand.engine.blobs[PeerId(f"peer of {node}"), part.digest] = data
    assert not await stand.courier.fetch_part(part, OTHERS)
    assert not await stand.courier.fetch_part(part, OTHERS)  # nor now that its bytes are here
