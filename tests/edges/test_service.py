"""The door and the link: real gRPC over TLS on loopback, a real store, real blobs, the real machine."""

import asyncio
import math
import re
import socket
import ssl
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from structlog.testing import capture_logs

from coordinator import service as door
from coordinator import transfers
from coordinator.auditor import Auditor
from coordinator.core import audits, machine, quotas
from coordinator.core.names import distinct_name, generated_name, visible
from coordinator.core.strikes import Kind
from coordinator.recounter import Recounter
from coordinator.service import ALIVE_SECONDS, CoordinatorService, serve
from coordinator.store import Store
from node.core.session import LinkLost
from node.liaison import Liaison
from node.link import Beat, Door, Link
from node.membership import STANDING, Membership
from protocol import address, canonical, contribution, identity, invite, tls
from protocol.blobs import BlobStore, digest_of
from protocol.codec import codec
from protocol.contribution import Complaint, grant_of
from protocol.errors import Code, Exit, Refused
from protocol.exchange import Packing
from protocol.identity import Key, peer_id_of
from protocol.limits import BLOB_CHUNK_BYTES, CONTROL_BYTES_MAX, PROTOCOL_VERSION, ROSTERS_RECALLED_MAX
from protocol.log import (
    VOTE,
    check_brought,
    check_certificate,
    genesis_head,
    head_after,
    next_head,
    record_hash,
    vote_bytes,
)
from protocol.proof import Evidence, Said
from protocol.state import Consumed
from protocol.types import (
    Ballot,
    BaseCheckpoint,
    BlobRef,
    Certificate,
    Contribution,
    Fault,
    LogEntry,
    Manifest,
    Part,
    Record,
    Rollback,
    Shard,
    Signature,
    VoteBody,
)
from protocol.v1 import barnraise_pb2 as wire

GENESIS = "11" * 32
PARAMETERS = 65536
NOTHING = digest_of(b"an update")
DAY_MS = 86_400_000


def certified(entry, roster):
    try:
        check_certificate(entry, roster)
    except Refused:
        return False
    return True


class RealDesk:
    """A coordinator's loop without folding: the real machine, store and blobs."""

    def __init__(self, folder):
        self.folder = folder
        self.key = Key.generate()
        self.blobs = BlobStore(folder / "blobs")
        self.store = Store(folder / "coordinator.db")
        self.run = identity.run_id(self.key.public, "test")
        tokenizer = self.blobs.put_bytes(b"{}")
        data = self.blobs.put_bytes(bytes(range(256)) * 16)
        self.heldout = self.blobs.put_bytes(b"secret" * 100)
        self.shards = (Shard(data.digest, data.size, 2048, 128),)
        manifest = Manifest(
            self.run,
            "test",
            "{}",
            "{}",
            tokenizer,
            256,
            PARAMETERS,
            "22" * 32,
            GENESIS,
            16,
            2,
            canonical.digest(self.shards),
            "5.0",
        )
        self.manifest = identity.sign_manifest(self.key, manifest)
        self.checkpoint = BaseCheckpoint(
            0, genesis_head(manifest).hash, GENESIS, self.blobs.put_bytes(b"base" * 300_000)
        )
        self.rendezvous = ("/ip4/127.0.0.1/tcp/4001/p2p/12D3",)
        self.heartbeat_seconds = 1.0
        self.over = False
        self.skew_ms = 0
        self.rules = machine.Rules(
            self.run,
            PARAMETERS,
            1,
            0,
            60.0,
            60.0,
            32,
            64,
            10**9,
            1,
            100,
            certified,
            check_brought,
            genesis_head(manifest).hash,
        )
        self.state = machine.State(
            genesis_head(manifest), genesis_head(manifest), GENESIS, Consumed(), self.store.load_leases(self.shards)
        )
        self.events, self.effects = [], []
        self.announced = asyncio.Event()
        self.accused = []
        self.auditor = self.audits(share=0.0)
        self.recounter = self.recounts(share=0.0)
        self.nobody_callable = False
        self.check_deciding = lambda: None

    def audits(self, share):
        """An auditor without an evaluator: it asks, and measures nothing."""
        return Auditor(
            self.folder / "audits",
            self.manifest.manifest,
            self.shards,
            codec("int4"),
            share=share,
            archive=self.blobs,
            evaluator=lambda: None,
            heard_ms=lambda node: 0.0,
            now_ms=self.now_ms,
            accuse=self.accused.append,
        )

    def recounts(self, share):
        return Recounter(
            self.folder / "evidence",
            Packing(codec("int4"), codec("int4")),
            share=share,
            heard_ms=lambda node: 0.0,
            now_ms=self.now_ms,
            strike=lambda *proved: None,
        )

    def base(self):
        return self.checkpoint

    def now_ms(self):
        return int(time.time() * 1000) + self.skew_ms

    def finished(self):
        return self.over

    def submit(self, event):
        if isinstance(event, machine.NodeOpened | machine.HeartbeatArrived):
            event = replace(event, source="")  # there is no rendezvous here that could call a node
        self.events.append(event)
        self.state, effects = machine.step(self.state, event, self.now_ms() / 1000, self.rules)
        self.effects += effects
        for effect in effects:
            match effect:
                case machine.SignRoster(roster):
                    signed = identity.sign_roster(self.key, roster)
                    self.store.save_roster(signed)
                    self.submit(machine.RosterSigned(signed))
                case machine.SaveRosters(rosters):
                    for signed in rosters:
                        self.store.save_roster(signed)
                case machine.TurnLog(signed):
                    self.turn(signed)
                case machine.SaveLeases():
                    self.store.save_leases(self.state.leases)
                case machine.SaveMarks(marks):
                    self.store.add_marks(marks)
                case machine.SaveEntry(entry):
                    credit = {c.node: c.tokens for c in entry.record.contributions}
                    self.store.append_entry(entry, credit, self.state.leases)
                    self.auditor.certified(entry.record)
                    self.recounter.certified(entry.record)
                case machine.Announce():
                    self.announce()
        return effects

    def turn(self, signed):
        """Only rollbacks to the first state: nothing stays."""
        assert signed.rollback.to.round == 0
        passed = self.state.rollbacks[len(self.store.rollbacks()) : signed.rollback.number - 1]
        self.store.save_rollback(signed, self.state.leases, passed)
        head = head_after(signed.rollback)
        self.submit(machine.RolledBack(signed, head, Consumed(), 0, self.state.leases))
        self.submit(machine.Rewound(head, GENESIS, (), frozenset()))

    def announce(self):
        self.announced.set()
        self.announced = asyncio.Event()

    async def news(self):
        await self.announced.wait()

    def part_stored(self, digest):
        self.submit(machine.PartStored(digest))


class World:
    def __init__(self, desk, service, server, cert):
        self.desk, self.service, self.server = desk, service, server
        self.fingerprint = tls.fingerprint(cert)
        self.address = f"127.0.0.1:{server.port}"
        self.links = []

    def invite(self, *, uses=1, expires_ms=None, token=None, store=True, run="test", key=None):
        token = token or Key.generate().private_bytes()[:16]
        expires_ms = expires_ms or self.desk.now_ms() + DAY_MS
        if store:
            self.desk.store.add_invite(token.hex(), uses=uses, expires_ms=expires_ms)
        return invite.encode(
            invite.issue(
                key or self.desk.key,
                addresses=(self.address,),
                fingerprint=self.fingerprint,
                name=run,
                token=token,
                uses=uses,
                expires_ms=expires_ms,
            )
        )

    def link(self, *, key=None, transport_key=None, **changes):
        where = replace(Door((self.address,), self.fingerprint, self.desk.run), **changes)
        link = Link(where, key=key or Key.generate(), transport_key=transport_key or Key.generate())
        self.links.append(link)
        return link

    async def member(self, **options):
        link = self.link()
        await link.open(life=1, invite=self.invite(), **options)
        return link

    def again(self, link):
        """The same node in another process."""
        return self.link(key=link._key, transport_key=link._transport_key)

    def rollback(self, number=1, *, key=None, run=None, reason="because"):
        to = genesis_head(self.desk.manifest.manifest)
        body = Rollback(run or self.desk.run, number, to, to, reason, self.desk.now_ms())
        return identity.sign_rollback(key or self.desk.key, body)

    def judge(self, link, kind, reason="because", *, seconds=None):
        until = None if seconds is None else self.desk.now_ms() / 1000 + seconds
        self.desk.submit(machine.Judged(link._key.public, kind, reason, until))

    async def training(self):
        """A member that is the whole roster."""
        link = await self.member()
        await link.heartbeat(Beat("training"))
        self.desk.submit(machine.Called(link._key.public, (), None))  # no caller here: it is believed
        news = await link.heartbeat(Beat("training"))
        assert news.roster is not None
        return link, news.roster.roster

    def decide(self, link, roster, parts, lease, update=NOTHING, evidence=None, voters=()):
        """The next record, of this one node, certified by it and these."""
        head, node = self.desk.state.head, link._key.public
        named = tuple(
            Part(i, i * 65536, (i + 1) * 65536, digest_of(data), len(data), node, (node,), evidence)
            for i, data in enumerate(parts)
        )
        told = Contribution(node, 16, (lease.range,), (grant_of(lease),), update)
        told = contribution.sign(link._key, self.desk.run, head.round, head.hash, told)
        record = Record(self.desk.run, head.round, head.hash, roster.epoch, node, (told,), named, GENESIS)
        ballot, digest = Ballot(roster.epoch, 0), record_hash(record)
        body = vote_bytes(VoteBody(self.desk.run, head.round, ballot, digest))
        votes = tuple(Signature(each._key.public, each._key.sign(VOTE, body)) for each in (link, *voters))
        return LogEntry(record, Certificate(digest, ballot, votes))


def files(folder):
    """What a door is served with."""
    return {"key": folder / "tls.key", "certificate": folder / "tls.pem", "sockets": folder / "door"}


@asynccontextmanager
async def a_world(tmp_path, host="127.0.0.1"):
    desk = RealDesk(tmp_path)
    served = files(tmp_path)
    tls.make_certificate(served["key"], served["certificate"], [], tls.Owner(desk.key, desk.run, 1000))
    service = CoordinatorService(desk)
    server = await serve(service, listen=f"{host}:0", **served)
    world = World(desk, service, server, served["certificate"].read_bytes())
    world.address = f"{host}:{server.port}"
    yield world
    for link in world.links:
        await link.close()
    await world.server.stop(None)
    desk.store.close()


@pytest.fixture
async def world(tmp_path):
    async with a_world(tmp_path) as world:
        yield world


async def refused(awaitable):
    with pytest.raises(Refused) as caught:
        await awaitable
    return caught.value


# admission


async def test_an_invited_node_is_let_in_with_all_it_needs(world):
    link = world.link()
    opened = await link.open(life=1, invite=world.invite(), name="My box", addresses=["/ip4/127.0.0.1/tcp/4001"])
    body = identity.check_pass(world.desk.key.public, opened.signed_pass, world.desk.now_ms())
    assert (body.node, body.peer, body.name) == (link._key.public, link.peer, "My box")
    assert opened.manifest == world.desk.manifest
    assert opened.base == world.desk.checkpoint
    assert opened.shards == world.desk.shards
    assert opened.rendezvous == world.desk.rendezvous
    assert opened.roster is None
    assert abs(opened.skew_seconds) < 5
    stored = world.desk.store.node(link._key.public)
    assert (stored.peer, stored.name, stored.signed_pass) == (link.peer, "My box", opened.signed_pass)
    assert world.desk.state.nodes[link._key.public].addresses == ("/ip4/127.0.0.1/tcp/4001",)


async def test_an_admitted_node_comes_back_without_an_invite(world):
    link = await world.member(name="heron")
    await link.close()
    opened = await link.open(life=1)
    assert opened.signed_pass.body.name == "heron"
    assert world.desk.store.invites()[0].used == 1


async def test_a_node_with_the_same_invite_twice_spends_it_once(world):
    link, text = world.link(), world.invite(uses=2)
    await link.open(life=1, invite=text)
    await link.open(life=1, invite=text)
    assert world.desk.store.invites()[0].used == 1


async def test_a_stranger_without_an_invite_is_not_admitted(world):
    assert (await refused(world.link().open(life=1))).reason is Code.NOT_ADMITTED
    assert world.desk.store.nodes() == ()


async def test_wrong_invites_are_refused_by_name(world):
    used = world.invite()
    await world.link().open(life=1, invite=used)
    cases = {
        "no invite": Code.INVITE_MALFORMED,
        used[:-3] + ("a" if used[-3] != "a" else "b") + used[-2:]: Code.INVITE_MISTYPED,
        used: Code.INVITE_USED,
        world.invite(store=False): Code.INVITE_UNKNOWN,
        world.invite(expires_ms=world.desk.now_ms() - 1000): Code.INVITE_EXPIRED,
        world.invite(key=Key.generate()): Code.INVITE_FORGED,
        world.invite(run="other"): Code.INVITE_FORGED,
    }
    for text, reason in cases.items():
        assert (await refused(world.link().open(life=1, invite=text))).reason is reason
    assert len(world.desk.store.nodes()) == 1
    assert world.service.refusals["E-INVITE-004"] == 1


async def test_a_single_use_invite_raced_by_twenty_nodes_admits_one(world):
    text = world.invite()
    answers = await asyncio.gather(*(world.link().open(life=1, invite=text) for _ in range(20)), return_exceptions=True)
    refusals = [answer.reason for answer in answers if isinstance(answer, Refused)]
    assert refusals == [Code.INVITE_USED] * 19
    assert len(world.desk.store.nodes()) == 1
    assert world.desk.store.invites()[0].used == 1


async def test_a_peer_id_belongs_to_one_node_and_a_node_has_one_peer_id(world):
    first = await world.member()
    twin = world.link(transport_key=first._transport_key)
    text = world.invite()
    assert (await refused(twin.open(life=1, invite=text))).reason is Code.IDENTITY_TAKEN
    moved = world.link(key=first._key)
    assert (await refused(moved.open(life=1))).reason is Code.IDENTITY_TAKEN
    await world.link().open(life=1, invite=text)  # the refused twin did not use it up


async def test_a_banned_node_is_shut_out_at_once(world):
    link = await world.member()
    world.judge(link, Kind.BAN, "it floods us")
    refusal = await refused(link.heartbeat(Beat("training")))
    assert (refusal.reason, refusal.reason.exit) == (Code.BANNED, Exit.REFUSED)
    assert refusal.what == "the researcher has excluded this node: it floods us"
    assert "barnraise leave --purge" in refusal.fix
    assert (await refused(link.open(life=1))).reason is Code.BANNED
    again = Store(world.desk.store.path)
    assert [(mark.kind, mark.reason) for mark in again.marks()] == [(Kind.BAN, "it floods us")]
    again.close()


async def test_a_ban_ends_the_heartbeat_that_waits_and_gives_the_leases_back(world):
    link, roster = await world.training()
    assert await link.acquire_leases(8) and world.desk.state.leases.of(link._key.public)
    waiting = asyncio.create_task(refused(link.heartbeat(Beat("training", epoch=roster.epoch), wait_seconds=25)))
    await asyncio.sleep(0.2)
    began = time.monotonic()
    world.judge(link, Kind.BAN)
    assert (await waiting).reason is Code.BANNED and time.monotonic() - began < 2
    assert not world.desk.state.leases.of(link._key.public)


async def test_a_ban_ends_a_download_between_two_chunks(world):
    link = await world.member()
    blob = world.desk.blobs.put_bytes(b"large" * 2_000_000)
    world.desk.checkpoint = replace(world.desk.checkpoint, blob=blob)
    other = await world.member()
    with capture_logs() as said:
        await other.fetch_blob(blob, BlobStore(world.desk.folder / "others"))
        await asyncio.sleep(0.05)
    (line,) = (each for each in said if each["event"] == "a node has downloaded a blob")
    assert line["node"] == other._key.public[:16] and line["bytes"] == blob.size
    chunks = link._chunks(blob.digest, 0)
    await anext(chunks)
    world.judge(link, Kind.BAN)
    with pytest.raises(Refused) as caught:
        async for chunk in chunks:
            assert chunk.offset + len(chunk.data) < blob.size
    assert caught.value.reason is Code.BANNED
    refusal = await refused(link.fetch_blob(world.desk.checkpoint.blob, BlobStore(world.desk.folder / "mine")))
    assert refusal.reason is Code.BANNED


async def test_a_kick_says_how_long_it_lasts_and_an_unban_ends_it(world):
    link = await world.member()
    world.judge(link, Kind.KICK, "restart with --device cpu", seconds=600)
    refusal = await refused(link.heartbeat(Beat("training")))
    assert (refusal.reason, refusal.reason.exit) == (Code.KICKED, Exit.REFUSED)
    assert refusal.what == "the researcher has sent this node away for another 10 min: restart with --device cpu"
    assert (await refused(link.open(life=2))).reason is Code.KICKED
    world.judge(link, Kind.UNBAN)
    await link.open(life=2)
    world.judge(link, Kind.KICK, seconds=0.3)
    assert (await refused(link.heartbeat(Beat("training")))).reason is Code.KICKED
    await asyncio.sleep(0.3)
    await link.open(life=3)


def word(link, record, *, purpose=VOTE, ballot=None):
    body = VoteBody(record.run, record.round, ballot or Ballot(record.epoch, 0), record_hash(record))
    return Said(link._key.public, purpose, body, link._key.sign(purpose, vote_bytes(body)))


async def test_what_a_report_proves_is_judged_and_a_false_one_costs_nobody_anything(world):
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(1)
    reporter = await world.member()
    one = world.decide(link, roster, [b"x"], lease).record
    two = replace(one, state="ab" * 32)
    for evidence in (
        Evidence(word(link, one)),
        Evidence(word(link, one), word(link, one)),
        Evidence(word(reporter, one), replace(word(reporter, two), node=link._key.public)),
        Evidence(word(link, one), record=one),
        Evidence(word(world.link(), one), word(world.link(), two)),  # of nobody who was ever let in
    ):
        assert (await refused(reporter.report(evidence))).reason in (Code.UNPROVED, Code.SIGNATURE)
    assert world.desk.state.trails == {} and world.service.refusals[Code.UNPROVED.code] >= 3
    assert await reporter.report(Evidence(word(link, one), word(link, two))) == "contradicted"
    assert await link.report(Evidence(word(link, two), word(link, one))) == "contradicted"  # known already
    (warning,) = world.desk.state.trails[link._key.public]
    assert (warning.kind, warning.fault) == (Kind.WARNING, Fault.CONTRADICTED)
    stranger = replace(one, contributions=(replace(one.contributions[0], node=reporter._key.public),))
    assert await reporter.report(Evidence(word(link, stranger), record=stranger)) == "forged"
    assert (await refused(link.heartbeat(Beat("training")))).reason is Code.BANNED
    assert world.desk.state.trails.keys() == {link._key.public}


async def test_reports_are_counted(world):
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(1)
    same = word(link, world.decide(link, roster, [b"x"], lease).record)
    request = wire.ReportRequest(evidence=canonical.to_bytes(Evidence(same, same)))
    codes = []
    for _ in range(int(quotas.REPORTS.burst) + 1):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await link._stub.Report(request, metadata=link._metadata())
        codes.append(caught.value.code())
    assert codes[0] is grpc.StatusCode.PERMISSION_DENIED and codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def in_a_roster(world, others=1):
    """One that brings work to the open round, the others, its contribution before it is signed, and bytes no codec reads."""
    link, roster = await world.training()
    here = [link]
    for number in range(others):
        here.append(other := await world.member())
        await other.heartbeat(Beat("training"))
        world.desk.submit(machine.Called(other._key.public, (), None))
        (lease,) = await link.acquire_leases(8)
        await link.push_entry(world.decide(link, roster, [b"x" * 9], lease, voters=here[1:-1]))
        world.desk.part_stored(digest_of(b"x" * 9))
        world.desk.submit(machine.Folded(number, GENESIS))
        for each in here:
            await each.heartbeat(Beat("training", world.desk.state.head, roster.epoch, known_round=number + 1))
        roster = world.desk.state.roster.roster
        assert {each._key.public for each in here} == set(roster.nodes)
    (lease,) = await link.acquire_leases(8)
    bad = bytearray(codec("int4").encode(np.ones(PARAMETERS, np.float32)))
    bad[:2] = b"\x00\x7e"
    plain = Contribution(link._key.public, 16, (lease.range,), (grant_of(lease),), digest_of(bytes(bad)))
    return *here, plain, bytes(bad)


async def test_who_signed_what_no_codec_reads_is_asked_for_it_and_accused_though_nothing_is_audited(world):
    link, other, plain, bad = await in_a_roster(world)
    auditor, head = world.desk.auditor, world.desk.state.head
    brought = contribution.sign(link._key, world.desk.run, head.round, head.hash, plain)
    assert (await refused(link.upload_part(plain.update, bad))).reason is Code.BLOB_MISSING  # nobody has asked
    complaint = Complaint(head.round, head.hash, brought)
    asked = Beat("training", epoch=world.desk.state.roster.roster.epoch, known_round=head.round)
    await link.heartbeat(asked)
    waiting = asyncio.create_task(link.heartbeat(asked, wait_seconds=20))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    for _ in range(2):
        await other.complain(complaint)
    async with asyncio.timeout(5):
        assert (await waiting).asked == (plain.update,)
    assert (await other.heartbeat(asked)).asked == ()
    assert (await refused(other.upload_part(plain.update, bad))).reason is Code.BLOB_MISSING
    reading = asyncio.create_task(auditor.read())
    assert await link.upload_part(plain.update, bad)
    async with asyncio.timeout(10):
        while not world.desk.accused:
            await asyncio.sleep(0.01)
    reading.cancel()
    (accusation,) = world.desk.accused
    assert (accusation.node, accusation.round, accusation.kind) == (link._key.public, head.round, audits.Kind.BROKEN)
    assert auditor.blobs.digests() == () and auditor.asked(link._key.public) == ()


async def test_who_shows_good_bytes_and_sent_most_members_others_is_accused_by_their_words(world):
    link, *others, plain, _ = await in_a_roster(world, others=2)
    auditor, head = world.desk.auditor, world.desk.state.head
    good = codec("int4").encode(np.ones(PARAMETERS, np.float32))
    signed = replace(plain, update=digest_of(good))
    brought = contribution.sign(link._key, world.desk.run, head.round, head.hash, signed)
    for other in others:
        await other.complain(Complaint(head.round, head.hash, brought))
    reading = asyncio.create_task(auditor.read())
    try:
        assert await link.upload_part(signed.update, good)
        async with asyncio.timeout(10):
            while not world.desk.accused:
                await asyncio.sleep(0.01)
    finally:
        reading.cancel()
    (accusation,) = world.desk.accused
    assert (accusation.node, accusation.fault, accusation.proved) == (link._key.public, Fault.GARBLED, False)
    assert "2 of 3 members" in accusation.reason


async def test_a_complaint_about_what_nobody_signed_or_about_no_round_of_now_has_nobody_asked(world):
    link, other, plain, _ = await in_a_roster(world)
    head, run, key = world.desk.state.head, world.desk.run, link._key
    stranger = await world.member()
    for said, by, code in (
        (Complaint(head.round, head.hash, plain), other, Code.SIGNATURE),
        (Complaint(head.round, head.hash, replace(plain, tokens=-1)), other, Code.RECORD_BAD),
        (Complaint(head.round, head.hash, contribution.sign(other._key, run, head.round, head.hash, plain)), other, 0),
        (Complaint(head.round, head.hash, contribution.sign(key, run, head.round, NOTHING, plain)), other, 0),
        (Complaint(head.round, NOTHING, contribution.sign(key, run, head.round, NOTHING, plain)), other, Code.UNPROVED),
        (Complaint(9, head.hash, contribution.sign(key, run, 9, head.hash, plain)), other, Code.UNPROVED),
        (Complaint(head.round, head.hash, contribution.sign(key, run, head.round, head.hash, plain)), stranger, 0),
    ):
        refusal = await refused(by.complain(said))
        assert refusal.reason in ((code,) if code else (Code.SIGNATURE, Code.UNPROVED)), said
    assert world.desk.auditor.asked(key.public) == ()
    first = Complaint(
        0, world.desk.state.head_before(0), contribution.sign(key, run, 0, world.desk.state.head_before(0), plain)
    )
    await other.complain(first)  # of the round before: it may show it still
    assert world.desk.auditor.asked(key.public) == (plain.update,)


async def test_a_second_record_for_a_round_is_told_and_who_signed_both_is_found(world):
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(1)
    first, second = (world.decide(link, roster, [data], lease) for data in (b"x", b"y"))
    await link.push_entry(first)
    world.desk.part_stored(digest_of(b"x"))
    for _ in range(2):
        await link.push_entry(second)
    (warning,) = world.desk.state.trails[link._key.public]
    assert warning.fault is Fault.CONTRADICTED and "vote" in warning.reason
    await link.push_entry(replace(first, certificate=replace(first.certificate, signatures=())))
    assert len(world.desk.state.trails[link._key.public]) == 1


async def test_a_strike_is_told_to_the_volunteer_at_once_and_takes_no_vote_from_it(world):
    link, roster = await world.training()
    waiting = asyncio.create_task(link.heartbeat(Beat("training", epoch=roster.epoch), wait_seconds=25))
    await asyncio.sleep(0.2)
    struck = machine.Struck(link._key.public, Fault.TRAINED_WRONG, 0, "3 of 5 values", "ab" * 32)
    world.desk.submit(struck)
    world.desk.submit(struck)
    news = await asyncio.wait_for(waiting, 2)
    assert news.notice.startswith("1 strike: in round 0 this node brought work") and "3 of 5 values" in news.notice
    assert await link.acquire_leases(8)  # there is nobody else to make rounds
    assert (await link.heartbeat(Beat("training", epoch=roster.epoch))).notice == news.notice
    assert len(world.desk.store.marks()) == 1


async def test_another_protocol_version_is_refused_with_both_versions(world, monkeypatch):
    monkeypatch.setattr("node.link.PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    refusal = await refused(world.link().open(life=1, invite=world.invite()))
    assert refusal.reason is Code.VERSION
    assert refusal.reason.exit is Exit.VERSION
    assert str(PROTOCOL_VERSION) in refusal.what
    assert str(PROTOCOL_VERSION + 1) in refusal.what


async def test_a_node_whose_clock_is_wrong_is_let_in_and_told(world):
    world.desk.skew_ms = -40 * 365 * DAY_MS
    opened = await world.link().open(life=1, invite=world.invite())
    assert opened.skew_seconds < -39 * 365 * 86400


# the pin


async def test_another_certificate_is_a_hard_stop_before_anything_is_sent(world):
    elsewhere = identity.run_id(Key.generate().public, "test")  # the run of the invite endorses no other
    refusal = await refused(world.link(fingerprint="00" * 32, run=elsewhere).open(life=1, invite=world.invite()))
    assert refusal.reason is Code.PIN_MISMATCH
    assert refusal.reason.exit is Exit.INTEGRITY
    assert not world.service._nonces
    assert not world.desk.events


async def test_the_next_address_is_tried_when_one_is_silent(world):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        silent = f"127.0.0.1:{closed.getsockname()[1]}"
        await world.link(addresses=(silent, world.address)).open(life=1, invite=world.invite())
        refusal = await refused(world.link(addresses=(silent,)).open(life=1, invite=world.invite()))
        assert refusal.reason is Code.UNREACHABLE


@pytest.mark.parametrize(
    ("second", "starts"), [("127.0.0.1", False), ("localhost", False), ("::1", False), ("127.0.0.1", True)]
)
async def test_a_coordinator_that_moves_to_another_of_its_addresses_is_found_again(
    world, tmp_path, monkeypatch, second, starts
):
    """By a node that is running or has just been let in, over IPv4, a name or IPv6; the pin is the same."""
    monkeypatch.setattr("node.liaison.wait_seconds", lambda **_: 0.05)
    with socket.socket(socket.AF_INET6 if second == "::1" else socket.AF_INET) as free:
        free.bind((second, 0))
        port = free.getsockname()[1]
    at = f"[{second}]:{port}" if ":" in second else f"{second}:{port}"
    link = world.link(addresses=(world.address, at))
    membership = Membership(link._key.public, link, invite.decode(world.invite()), "heron", tmp_path / "journal")
    await membership.begin(known=False)
    heard = []
    stand = SimpleNamespace(
        _membership=membership,
        _come_back=membership.enter,
        _decider=SimpleNamespace(session=SimpleNamespace(linked=True), post=heard.append),
        beat=lambda: link.heartbeat(Beat("training")),
    )
    await world.server.stop(None)

    async def read():
        heard.append(await link.read_log(0))

    calling = asyncio.create_task(Liaison.retrying(stand, read) if starts else Liaison.heartbeat(stand))
    while not heard:
        await asyncio.sleep(0.01)
    moved = await serve(world.service, listen=at, **files(tmp_path))
    try:
        async with asyncio.timeout(20):
            while all(isinstance(each, LinkLost) for each in heard):
                await asyncio.sleep(0.01)
        assert starts or not calling.done()
    finally:
        calling.cancel()
        await moved.stop(None)


SERVE = """
import asyncio, sys
from pathlib import Path
from coordinator.service import CoordinatorService, serve

async def main():
    key, cert = (Path(text) for text in sys.argv[1:])
    door = key.with_name("door")
    server = await serve(CoordinatorService(None), listen="127.0.0.1:0", key=key, certificate=cert, sockets=door)
    print(server.port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)

asyncio.run(main())
"""


def test_nothing_older_than_tls_1_3_is_spoken(tmp_path):
    """In a process of its own: grpcio reads its settings when it is imported first."""

    def connect(newest):
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = newest
        context.set_alpn_protocols(["h2"])
        with socket.create_connection(("127.0.0.1", port), 5) as plain, context.wrap_socket(plain) as secured:
            return secured.version()

    key = Key.generate()
    owner = tls.Owner(key, identity.run_id(key.public, "test"), 1000)
    tls.make_certificate(tmp_path / "tls.key", tmp_path / "tls.pem", [], owner)
    command = [sys.executable, "-c", SERVE, str(tmp_path / "tls.key"), str(tmp_path / "tls.pem")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        port = int(server.stdout.readline())
        assert connect(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises((ssl.SSLError, ConnectionError)):
            connect(ssl.TLSVersion.TLSv1_2)
        server.stdin.close()


async def test_a_manifest_of_another_signer_is_refused(world):
    world.desk.manifest = identity.sign_manifest(Key.generate(), world.desk.manifest.manifest)
    assert (await refused(world.link().open(life=1, invite=world.invite()))).reason is Code.SIGNATURE


async def test_a_second_manifest_of_the_same_run_stops_a_node_now_and_after_a_restart(world, tmp_path):
    shown = invite.decode(world.invite())

    def member():
        return Membership(link._key.public, link, shown, "heron", tmp_path / "journal")

    link = world.link()
    await member().begin(known=False)
    kept = (tmp_path / "journal" / STANDING).read_bytes()
    other = replace(world.desk.manifest.manifest, context=32)
    world.desk.manifest = identity.sign_manifest(world.desk.key, other)
    again = await refused(link.open(life=1))
    link = world.again(link)
    restarted = await refused(member().begin(known=True))
    for refusal in (again, restarted):
        assert (refusal.reason, refusal.reason.exit) == (Code.TWO_STORIES, Exit.INTEGRITY)
        assert canonical.digest(other)[:12] in refusal.what
    assert (tmp_path / "journal" / STANDING).read_bytes() == kept


@pytest.mark.parametrize(
    "other",
    [lambda shards: (), lambda shards: shards * 2, lambda shards: (replace(shards[0], sequences=127),)],
    ids=["none", "more", "changed"],
)
async def test_other_data_than_the_manifest_names_is_refused_at_every_open(world, other):
    link = await world.member()
    world.desk.shards = other(world.desk.shards)
    for who, text in ((link, ""), (world.link(), world.invite())):
        refusal = await refused(who.open(life=2, invite=text))
        assert (refusal.reason, refusal.reason.exit) == (Code.TWO_STORIES, Exit.INTEGRITY)
        assert world.desk.manifest.manifest.data[:12] in refusal.what


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": 10**15},
        {"parameters": 0},
        {"context": 10**8},
        {"vocabulary": 0},
        {"token_bytes": 1},
        {"transformers": "5.0; id"},
    ],
    ids=lambda change: " ".join(change),
)
async def test_a_manifest_of_impossible_sizes_is_refused(world, change):
    world.desk.manifest = identity.sign_manifest(world.desk.key, replace(world.desk.manifest.manifest, **change))
    assert (await refused(world.link().open(life=1, invite=world.invite()))).reason is Code.FIELD


# the challenge, by hand


async def proof(world, link, **changes):
    """An honest OpenRequest over the link's own channel, then changed."""
    await link._connect()
    node = link._key.public
    challenge = await link._stub.Challenge(wire.ChallengeRequest(node=node, protocol=PROTOCOL_VERSION))
    body = challenge.nonce + world.desk.run.encode()
    fields = {
        "node": node,
        "nonce": challenge.nonce,
        "signature": bytes.fromhex(link._key.sign("open", body)),
        "invite": world.invite(),
        "peer": link.peer,
        "peer_public_key": link._transport_key.public_bytes,
        "peer_signature": bytes.fromhex(link._transport_key.sign("peer", body + node.encode())),
        "protocol": PROTOCOL_VERSION,
        "life": 1,
        "incarnation": bytes(16),
    }
    return wire.OpenRequest(**(fields | changes))


async def status_of(call):
    """The gRPC status and our code of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), dict(caught.value.trailing_metadata()).get("barnraise-code")


UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
INVALID = grpc.StatusCode.INVALID_ARGUMENT


async def test_an_answer_is_good_once(world):
    link = world.link()
    request = await proof(world, link)
    await link._stub.Open(request)
    assert await status_of(link._stub.Open(request)) == (UNAUTHENTICATED, Code.CHALLENGE.code)


async def test_a_wrong_answer_spends_the_challenge(world):
    link = world.link()
    right = await proof(world, link)
    wrong = wire.OpenRequest()
    wrong.CopyFrom(right)
    wrong.signature = bytes(64)
    assert await status_of(link._stub.Open(wrong)) == (UNAUTHENTICATED, Code.SIGNATURE.code)
    assert await status_of(link._stub.Open(right)) == (UNAUTHENTICATED, Code.CHALLENGE.code)
    assert world.desk.store.nodes() == ()


async def test_an_answer_after_thirty_seconds_is_late(world):
    link = world.link()
    request = await proof(world, link)
    world.desk.skew_ms = 30_001
    assert await status_of(link._stub.Open(request)) == (UNAUTHENTICATED, Code.CHALLENGE.code)


async def test_a_challenge_is_for_one_node_on_one_connection(world):
    link, thief = world.link(), world.link()
    request = await proof(world, link)
    await thief._connect()
    assert await status_of(thief._stub.Open(request)) == (UNAUTHENTICATED, Code.CHALLENGE.code)
    other = await proof(world, thief, node=link._key.public)
    assert await status_of(thief._stub.Open(other)) == (UNAUTHENTICATED, Code.CHALLENGE.code)


async def test_a_signature_for_another_run_opens_nothing(world):
    link = world.link()
    request = await proof(world, link)
    request.signature = bytes.fromhex(link._key.sign("open", request.nonce + b"another run"))
    assert await status_of(link._stub.Open(request)) == (UNAUTHENTICATED, Code.SIGNATURE.code)


async def test_a_peer_id_must_be_proved(world):
    victim, link = Key.generate(), world.link()
    stolen = {"peer": peer_id_of(victim.public_bytes)}
    for changes, code in (
        (stolen, Code.FIELD),
        (stolen | {"peer_public_key": victim.public_bytes}, Code.SIGNATURE),
        ({"peer_public_key": b"short"}, Code.FIELD),
        ({"peer_signature": bytes(64)}, Code.SIGNATURE),
    ):
        request = await proof(world, link, **changes)
        assert (await status_of(link._stub.Open(request)))[1] == code.code
    assert world.desk.store.nodes() == ()


async def test_unanswered_challenges_are_bounded_and_a_flood_pushes_out_none(world, monkeypatch):
    monkeypatch.setattr(door, "NONCES_MAX", 8)
    link = world.link()
    request = await proof(world, link)
    asked = wire.ChallengeRequest(node=link._key.public, protocol=PROTOCOL_VERSION)
    for _ in range(7):
        await link._stub.Challenge(asked)
    for _ in range(5):
        assert (await status_of(link._stub.Challenge(asked)))[1] == Code.BUSY.code
    assert len(world.service._nonces) == 8
    assert (await link._stub.Open(request)).session
    assert await link._stub.Challenge(asked)  # there is room again


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/0.0.0.0/tcp/1", "/ip4/1.2.3.4/tcp/0", "/ip4/1.2.3.4/tcp/70000", "/ip6/1.2.3.4/tcp/1", "/unix/tmp/x",
        "/ip4/224.0.0.1/udp/9", "/ip4/1.2.3.4/tcp/1/p2p/12D3", "/dns4/x.org/tcp/1", "1.2.3.4:5", "",
    ],
)  # fmt: skip
async def test_addresses_that_nobody_could_use_are_refused(world, text):
    refusal = await refused(world.link().open(life=1, invite=world.invite(), addresses=[text]))
    assert refusal.reason is Code.FIELD
    assert world.desk.store.nodes() == ()


# sessions


async def test_without_a_session_nothing_is_answered(world):
    link = await world.member()
    for session in ("", "0" * 64):
        stub, metadata = link._stub, (("session", session),)
        calls = [
            stub.Heartbeat(wire.HeartbeatRequest(activity="training"), metadata=metadata),
            stub.AcquireLeases(wire.LeaseRequest(sequences=1), metadata=metadata),
            stub.ReadLog(wire.ReadLogRequest(), metadata=metadata),
            stub.PushEntry(wire.PushEntryRequest(), metadata=metadata),
            stub.ReadLeaves(wire.ReadLeavesRequest(), metadata=metadata),
            stub.Leave(wire.LeaveRequest(), metadata=metadata),
            stub.WriteBlob(iter([wire.BlobChunk()]), metadata=metadata),
        ]
        for call in calls:
            assert await status_of(call) == (UNAUTHENTICATED, Code.SESSION.code)
        blob = stub.ReadBlob(wire.ReadBlobRequest(digest=world.desk.checkpoint.blob.digest), metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await blob.read()
        assert caught.value.code() is UNAUTHENTICATED


async def test_a_newer_session_replaces_the_older(world):
    link = await world.member()
    older = link._session
    await link.open(life=1)
    assert await status_of(
        link._stub.Heartbeat(wire.HeartbeatRequest(activity="training"), metadata=(("session", older),))
    ) == (UNAUTHENTICATED, Code.SESSION.code)
    assert len(world.service._sessions) == 1


async def test_the_link_opens_a_forgotten_session_again_by_itself(world):
    link = await world.member()
    world.service._end_session(link._key.public)
    news = await asyncio.gather(*(link.heartbeat(Beat("training")) for _ in range(4)))
    assert len(news) == 4
    assert sum(isinstance(event, machine.NodeOpened) for event in world.desk.events) == 2


async def test_the_link_says_unreachable_when_the_coordinator_is_away_and_works_when_it_is_back(world, tmp_path):
    link = await world.member()
    port = world.server.port
    await world.server.stop(None)
    assert (await refused(link.heartbeat(Beat("training")))).reason is Code.UNREACHABLE
    world.server = again = await serve(CoordinatorService(world.desk), listen=f"127.0.0.1:{port}", **files(tmp_path))
    async with asyncio.timeout(20):
        while True:
            try:
                await link.heartbeat(Beat("training"))
                break
            except Refused as refusal:
                assert refusal.reason is Code.UNREACHABLE
                await asyncio.sleep(0.2)
    await link.close()
    await again.stop(None)


async def test_closing_the_link_ends_a_waiting_heartbeat_as_unreachable(world):
    link, roster = await world.training()
    waiting = asyncio.create_task(link.heartbeat(Beat("training", epoch=roster.epoch), wait_seconds=20))
    await asyncio.sleep(0.1)
    await link.close()
    assert (await refused(waiting)).reason is Code.UNREACHABLE


async def test_a_port_in_use_is_refused_by_name(world, tmp_path):
    again = serve(world.service, listen=world.address, **files(tmp_path) | {"sockets": tmp_path / "again"})
    assert (await refused(again)).reason is Code.PORT_IN_USE
    assert not (tmp_path / "again").exists()


async def test_leaving_gives_the_leases_back_and_ends_the_session(world):
    link, _ = await world.training()
    assert await link.acquire_leases(10)
    await link.leave("the owner \x1b[31mneeds\nthe machine")
    assert not world.desk.state.leases.held
    assert world.desk.store.load_leases(world.desk.shards) == world.desk.state.leases
    assert not world.service._sessions
    assert "(the owner [31mneeds the machine)" in world.desk.state.events[-1][1]


# lives


async def test_the_same_process_opens_again_without_becoming_forgetful(world):
    link, _ = await world.training()
    world.service._end_session(link._key.public)
    assert (await link.heartbeat(Beat("training"))).silent_epoch is None
    opened = await link.open(life=1)
    assert (opened.life, opened.silent_epoch) == (1, None)
    assert not any(event.forgot for event in world.desk.events if isinstance(event, machine.NodeOpened))


async def test_a_started_node_says_a_higher_life_and_has_forgotten_nothing(world):
    link, _ = await world.training()
    opened = await world.again(link).open(life=2)
    assert (opened.life, opened.silent_epoch) == (2, None)
    assert world.desk.state.silent == {}


async def test_a_node_whose_disk_was_put_back_is_told_what_it_must_not_sign_under(world):
    link, roster = await world.training()
    await world.again(link).open(life=7)
    node, restored = link._key.public, world.again(link)
    opened = await restored.open(life=3)
    assert (opened.life, opened.silent_epoch) == (8, roster.epoch)
    assert world.desk.state.silent == world.desk.store.silent() == {node: roster.epoch}
    assert (await restored.open(life=3)).life == 8  # the first answer was lost on its way
    later = await world.again(link).open(life=9)
    assert (later.life, later.silent_epoch) == (9, roster.epoch)  # no start brings the promises back
    forgot = [event.forgot for event in world.desk.events if isinstance(event, machine.NodeOpened)]
    assert forgot == [False, False, True, False, False]


async def test_a_clone_and_the_node_that_it_is_a_copy_of_are_both_silent(world):
    link, roster = await world.training()
    clone = world.again(link)
    assert (await clone.open(life=1)).silent_epoch == roster.epoch
    news = await link.heartbeat(Beat("training", epoch=roster.epoch))  # its session was replaced, so it opens another
    assert news.silent_epoch == roster.epoch
    assert world.desk.store.begin_life(link._key.public, 1, roster.epoch, bytes(16))[0] == 4


async def beats(link, epoch, heard):
    """A node that is there."""
    while True:
        heard.append(await link.heartbeat(Beat("training", epoch=epoch), wait_seconds=20))


async def test_of_two_processes_with_one_key_the_second_is_refused_and_both_are_told(world):
    link, roster = await world.training()
    heard = []
    alive = asyncio.create_task(beats(link, roster.epoch, heard))
    await asyncio.sleep(0.2)
    began = time.monotonic()
    refusal = await refused(world.again(link).open(life=1))
    assert (refusal.reason, refusal.reason.exit) == (Code.IDENTITY_TAKEN, Exit.REFUSED)
    assert re.fullmatch(r"this node's key is in use since \d\d:\d\d UTC from this address", refusal.what)
    assert time.monotonic() - began < ALIVE_SECONDS
    await asyncio.sleep(0.2)
    assert any("another process with this node's key came, and was refused" in news.notice for news in heard)
    assert all(news.silent_epoch is None for news in heard)  # the first keeps its vote
    assert any("a second process with its key" in text for _, text in world.desk.state.events)
    assert world.desk.state.trails == {}
    alive.cancel()


async def test_a_node_that_starts_again_is_not_kept_out_by_what_is_left_of_it(world, monkeypatch):
    """Its machine lost power: the connection of its last process is still open here, and nobody answers on it."""
    monkeypatch.setattr(door, "ALIVE_SECONDS", 0.5)
    link, roster = await world.training()
    (session,) = world.service._sessions.values()
    session.calls = 1
    again = world.again(link)
    await again.open(life=2)
    assert (await again.heartbeat(Beat("training", epoch=roster.epoch))).silent_epoch is None


async def test_a_life_that_was_raised_between_starts_shows_that_a_younger_backup_came_back(world):
    link, roster = await world.training()
    assert (await link.heartbeat(Beat("training", epoch=roster.epoch, life=5))).silent_epoch is None
    assert (await world.again(link).open(life=2)).silent_epoch == roster.epoch


async def test_a_node_that_forgot_before_there_was_a_roster_may_sign_under_all(world):
    link = await world.member()
    opened = await world.again(link).open(life=1)
    assert (opened.life, opened.silent_epoch) == (2, None)


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"life": 2**63}, "life"), ({"incarnation": b"short"}, "incarnation"), ({"incarnation": b""}, "inc")],
)
async def test_a_life_out_of_its_range_is_refused_by_name(world, fields, named):
    link = world.link()
    request = await proof(world, link, **fields)
    with pytest.raises(grpc.aio.AioRpcError, match=named) as caught:
        await link._stub.Open(request)
    assert caught.value.code() is INVALID
    assert world.desk.store.nodes() == ()


# rollbacks


async def test_a_node_is_told_all_rollbacks_when_it_opens_and_when_it_reads(world):
    link = await world.member()
    signed = tuple(world.rollback(number) for number in (1, 2))
    world.desk.submit(machine.Recalled((), signed))
    assert (await link.open(life=1)).rollbacks == signed
    page = await link.read_log(0)
    assert (page.rollbacks, page.entries) == (signed, ())


async def test_a_waiting_heartbeat_wakes_on_a_rollback(world):
    link, roster = await world.training()
    beat = Beat("training", epoch=roster.epoch)
    waiting = asyncio.create_task(link.heartbeat(beat, wait_seconds=20))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    began = time.monotonic()
    signed = tuple(world.rollback(number) for number in (1, 2))
    world.desk.state = replace(world.desk.state, rollbacks=signed)  # and no new roster, which would be news as well
    world.desk.announce()
    news = await waiting
    assert time.monotonic() - began < 5
    assert (news.rollbacks, news.branch) == (signed, 2)
    news = await link.heartbeat(replace(beat, branch=1), wait_seconds=20)
    assert news.rollbacks == signed[1:]
    epoch = world.desk.state.next_epoch  # whoever knows all has to wait
    began = time.monotonic()
    assert (await link.heartbeat(replace(beat, epoch=epoch, branch=2), wait_seconds=0.4)).rollbacks == ()
    assert time.monotonic() - began > 0.35


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (lambda world: [world.rollback(1, key=Key.generate())], Code.SIGNATURE),
        (
            lambda world: [replace(world.rollback(1), rollback=world.rollback(1, reason="else").rollback)],
            Code.SIGNATURE,
        ),
        (lambda world: [world.rollback(1, run=identity.run_id(world.desk.key.public, "other"))], Code.SIGNATURE),
        (lambda world: [world.rollback(2)], Code.FIELD),
        (lambda world: [world.rollback(1), world.rollback(3)], Code.FIELD),
        (lambda world: [world.rollback(1), world.rollback(1)], Code.FIELD),
        (lambda world: [world.rollback(0)], Code.FIELD),
        (lambda world: [world.rollback(1, reason="x" * 201)], Code.LIMIT),
        (lambda world: [world.rollback(1)] * 257, Code.LIMIT),
    ],
    ids=["signer", "changed", "run", "first", "gap", "twice", "zero", "reason", "many"],
)
async def test_a_node_refuses_rollbacks_that_are_not_genuine_or_leave_a_gap(world, forge, reason):
    link, roster = await world.training()
    beat = Beat("training", epoch=roster.epoch)
    state = world.desk.state
    world.desk.state = replace(state, rollbacks=tuple(forge(world)), branch=10**6)
    assert (await refused(link.read_log(0))).reason is reason
    assert (await refused(link.open(life=1))).reason is reason
    world.desk.state = state
    await link.open(life=1)
    world.desk.state = replace(state, rollbacks=tuple(forge(world)), branch=10**6)
    if all(signed.rollback.number > 0 for signed in world.desk.state.rollbacks):  # else it is never told
        assert (await refused(link.heartbeat(beat))).reason is reason
    world.desk.state = state


# what a coordinator has forgotten


async def test_a_coordinator_learns_again_what_it_signed_before_its_database_was_put_back(world):
    link, roster = await world.training()
    newer = replace(roster, epoch=3)
    signed = identity.sign_roster(world.desk.key, newer)
    rollbacks = (world.rollback(1), world.rollback(2))
    assert await link.push_entry(None, [signed, world.desk.state.roster], rollbacks) == ()
    assert machine.Recalled((signed,), rollbacks) in world.desk.events
    assert world.desk.state.rollbacks == world.desk.store.rollbacks() == rollbacks
    assert world.desk.state.history[3] == signed
    assert signed in world.desk.store.rosters()
    news = await link.heartbeat(Beat("training", epoch=3, branch=2))
    assert (news.epoch, news.branch) == (4, 2)  # the next roster takes no number twice
    assert (news.roster.roster.epoch, news.roster.roster.branch) == (4, 2)


async def test_what_is_known_already_is_not_brought_to_the_machine_again(world):
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(4)
    before = len(world.desk.events)
    await link.push_entry(world.decide(link, roster, [b"x"], lease), [world.desk.state.roster] * 2)
    assert [type(event) for event in world.desk.events[before:]] == [machine.EntryArrived]


async def test_more_rosters_than_fit_are_brought_a_part_at_a_time(world):
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(4)
    signed = [identity.sign_roster(world.desk.key, replace(roster, epoch=epoch)) for epoch in range(1, 31)]
    await link.push_entry(world.decide(link, signed[-1].roster, [b"x"], lease), signed)
    assert world.desk.store.entry_count == 1  # what certifies the record goes first
    assert sorted(world.desk.state.history) == [*range(ROSTERS_RECALLED_MAX), 30]
    stub, metadata = link._stub, link._metadata()
    request = wire.PushEntryRequest(rosters=map(canonical.to_bytes, signed))
    limit = (grpc.StatusCode.RESOURCE_EXHAUSTED, Code.LIMIT.code)
    assert await status_of(stub.PushEntry(request, metadata=metadata)) == limit
    assert len(world.desk.state.history) == ROSTERS_RECALLED_MAX + 1


async def test_a_roster_that_certifies_the_record_is_learned_before_it(world):
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(4)
    signed = identity.sign_roster(world.desk.key, replace(roster, epoch=1))
    entry = world.decide(link, signed.roster, [b"x"], lease)
    await link.push_entry(entry)
    assert world.desk.store.entry_count == 0
    await link.push_entry(entry, [signed])
    assert world.desk.store.entry_count == 1


@pytest.mark.parametrize(
    ("bring", "reason"),
    [
        (lambda world, roster: ([identity.sign_roster(Key.generate(), roster)], []), Code.SIGNATURE),
        (
            lambda world, roster: ([identity.sign_roster(world.desk.key, replace(roster, epoch=0))], []),
            Code.TWO_STORIES,
        ),
        (
            lambda world, roster: (
                [identity.sign_roster(world.desk.key, replace(roster, run=roster.run[:-4] + "else"))],
                [],
            ),
            Code.SIGNATURE,
        ),
        (lambda world, roster: ([], [world.rollback(1, key=Key.generate())]), Code.SIGNATURE),
        (lambda world, roster: ([], [world.rollback(1, run=roster.run[:-4] + "else")]), Code.SIGNATURE),
        (lambda world, roster: ([], [world.rollback(2)]), Code.FIELD),
        (lambda world, roster: ([], [world.rollback(1), world.rollback(3)]), Code.FIELD),
        (lambda world, roster: ([], [world.rollback(1), world.rollback(1, reason="else")]), Code.TWO_STORIES),
        (lambda world, roster: ([], [world.rollback(1)] * 257), Code.LIMIT),
    ],
    ids=["roster-signer", "roster-two", "roster-run", "signer", "run", "first", "gap", "two", "many"],
)
async def test_nothing_is_recalled_that_the_coordinator_did_not_sign_itself(world, bring, reason):
    link, roster = await world.training()
    before = world.desk.state
    rosters, rollbacks = bring(world, replace(roster, epoch=9, issued_ms=roster.issued_ms + 1))
    assert (await refused(link.push_entry(None, rosters, rollbacks))).reason is reason
    assert world.desk.state is before


# heartbeats and leases


async def test_a_waiting_heartbeat_wakes_on_a_new_roster(world):
    first, roster = await world.training()
    began = time.monotonic()
    waiting = asyncio.create_task(first.heartbeat(Beat("training", epoch=roster.epoch), wait_seconds=20))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    second = await world.member()
    await second.heartbeat(Beat("training"))
    world.desk.submit(machine.Called(second._key.public, (), None))
    await second.heartbeat(Beat("training"))
    news = await waiting
    assert time.monotonic() - began < 5
    assert set(news.roster.roster.nodes) == {first._key.public, second._key.public}


async def test_a_heartbeat_without_news_is_answered_after_its_wait(world):
    link, roster = await world.training()
    began = time.monotonic()
    news = await link.heartbeat(Beat("training", epoch=roster.epoch), wait_seconds=0.4)
    assert 0.35 < time.monotonic() - began < 3
    assert news.roster is None
    assert news.wanted == ()
    assert not news.finished


async def test_a_heartbeat_that_changes_nothing_wakes_none_that_wait(world, monkeypatch):
    link, other, *_ = await in_a_roster(world)
    beat = Beat("training", epoch=world.desk.state.roster.roster.epoch, known_round=1)
    for each in (link, other):
        await each.heartbeat(beat)
    looked, has_news = [], world.service._news
    monkeypatch.setattr(world.service, "_news", lambda *words: looked.append(words) or has_news(*words))
    waiting = asyncio.create_task(link.heartbeat(beat, wait_seconds=20))
    async with asyncio.timeout(10):
        while not looked:
            await asyncio.sleep(0.01)
        for speed in range(20):
            await other.heartbeat(replace(beat, tokens_per_second=speed))
        assert len(looked) == 1 + 20, "each for itself"
        world.desk.announce()
        while len(looked) < 1 + 20 + 1:
            await asyncio.sleep(0.01)
    assert not waiting.done()
    waiting.cancel()


@pytest.mark.parametrize("field", ["wanted", "asked"])
@pytest.mark.parametrize("file", ["../../../../etc/passwd", "/etc/passwd", "node.key", "", "A" * 64])
async def test_a_coordinator_that_asks_for_a_file_is_told_what_it_may_ask_for(world, monkeypatch, field, file):
    link, _ = await world.training()
    honest = CoordinatorService._answer

    def answer(self, *arguments):
        reply = honest(self, *arguments)
        getattr(reply, field).append(file)
        return reply

    monkeypatch.setattr(CoordinatorService, "_answer", answer)
    refusal = await refused(link.heartbeat(Beat("training")))
    assert refusal.reason is Code.FIELD and "expected 64 hex digits" in refusal.what
    assert refusal.reason.exit is Exit.REFUSED, "the node ends with this sentence (node/liaison.py)"


async def test_news_that_was_told_is_no_news(world):
    """A part that nobody has must not turn heartbeats into a busy loop."""
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(4)
    await link.push_entry(world.decide(link, roster, [b"x" * 9], lease))
    beat = Beat("training", epoch=roster.epoch, known_round=1)
    assert (await link.heartbeat(beat, wait_seconds=20)).wanted == (digest_of(b"x" * 9),)
    began = time.monotonic()
    assert (await link.heartbeat(beat, wait_seconds=0.4)).wanted == (digest_of(b"x" * 9),)
    assert time.monotonic() - began > 0.35
    world.desk.over = True
    assert (await link.heartbeat(beat, wait_seconds=20)).finished


async def test_a_heartbeat_wakes_when_the_head_moves(world):
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(4)
    waiting = asyncio.create_task(link.heartbeat(Beat("training", epoch=roster.epoch), wait_seconds=20))
    await asyncio.sleep(0.1)
    await link.push_entry(world.decide(link, roster, [b"x" * 9], lease))
    assert (await waiting).head_round == 1


async def test_leases_are_granted_renewed_and_kept(world):
    link, roster = await world.training()
    leases = await link.acquire_leases(40)
    assert [(lease.range.start, lease.range.stop) for lease in leases] == [(0, 32), (32, 40)]
    assert world.desk.store.load_leases(world.desk.shards) == world.desk.state.leases
    ids = tuple(lease.lease_id for lease in leases)
    news = await link.heartbeat(Beat("training", epoch=roster.epoch, lease_ids=(*ids, "fff")))
    assert news.renewed == ids
    assert len(await link.acquire_leases(1000)) == 1  # up to 64 sequences for one node
    assert await link.acquire_leases(1) == ()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"activity": "dancing"}, "activity"),
        ({"activity": ""}, "activity"),
        ({"tokens_per_second": -1.0}, "tokens_per_second"),
        ({"tokens_per_second": float("nan")}, "tokens_per_second"),
        ({"busy_share": float("inf")}, "busy_share"),
        ({"wait_seconds": float("nan")}, "wait_seconds"),
        ({"head_round": 2**63}, "head_round"),
        ({"bytes_sent": 2**64 - 1}, "bytes_sent"),
        ({"branch": 2**53 + 1}, "branch"),
        ({"life": 2**53 + 1}, "life"),
        ({"lease_ids": [""]}, "lease_ids"),
        ({"lease_ids": ["0"] * 300}, "lease_ids"),
        ({"addresses": ["/ip4/1.2.3.4/tcp/1"] * 9}, "addresses"),
    ],
)
async def test_a_field_out_of_its_range_is_refused_by_name(world, fields, named):
    link = await world.member()
    before = world.desk.state
    request = wire.HeartbeatRequest(**({"activity": "training"} | fields))
    with pytest.raises(grpc.aio.AioRpcError, match=named) as caught:
        await link._stub.Heartbeat(request, metadata=link._metadata())
    assert caught.value.code() is INVALID
    assert world.desk.state is before


async def test_no_sequences_and_too_many_are_refused(world):
    link = await world.member()
    for sequences in (0, 2**40):
        assert (await refused(link.acquire_leases(sequences))).reason is Code.FIELD


async def test_a_message_over_the_cap_is_refused_and_the_connection_survives(world):
    huge = wire.PushEntryRequest(entry=bytes(CONTROL_BYTES_MAX + (1 << 20))).SerializeToString()
    bare = grpc.aio.secure_channel(
        world.address,
        grpc.ssl_channel_credentials((world.desk.folder / "tls.pem").read_bytes()),
        [("grpc.ssl_target_name_override", tls.SERVER_NAME), ("grpc.max_send_message_length", -1)],
    )
    async with bare:
        for call, code in (
            ("Challenge", grpc.StatusCode.RESOURCE_EXHAUSTED),
            ("PushEntry", grpc.StatusCode.UNAUTHENTICATED),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bare.unary_unary(f"/barnraise.v1.Coordinator/{call}")(huge)
            assert caught.value.code() is code  # what needs a session is not read without one
        ok = bare.unary_unary("/barnraise.v1.Coordinator/Challenge")
        asked = wire.ChallengeRequest(node=Key.generate().public, protocol=PROTOCOL_VERSION)
        assert await ok(asked.SerializeToString())


async def test_one_node_has_so_many_calls_at_a_time(world, monkeypatch):
    monkeypatch.setattr(door, "CALLS_PER_NODE_MAX", 3)
    link, roster = await world.training()
    beat = Beat("training", epoch=roster.epoch)
    waiting = [asyncio.create_task(link.heartbeat(beat, wait_seconds=20)) for _ in range(3)]
    await asyncio.sleep(0.3)
    assert (await refused(link.heartbeat(beat))).reason is Code.LIMIT
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    await asyncio.sleep(0.2)
    await link.heartbeat(beat)


async def test_a_surprise_is_an_id_and_no_traceback(world, monkeypatch):
    link = await world.member()

    def broken(event):
        raise RuntimeError("secret path /home/researcher")

    monkeypatch.setattr(world.desk, "submit", broken)
    refusal = await refused(link.heartbeat(Beat("training")))
    assert refusal.reason is Code.INTERNAL
    assert "secret" not in refusal.what
    assert world.service.refusals[Code.INTERNAL.code] == 1


# the log and its blobs


async def test_a_certified_record_goes_in_with_its_parts_and_comes_out(world):
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(4)
    part = bytes(range(256)) * 3000
    entry = world.decide(link, roster, [part], lease)
    digest = digest_of(part)
    assert await link.push_entry(entry) == (digest,)
    assert world.desk.state.wanted
    assert await link.upload_part(digest, part)
    assert world.desk.blobs.read(digest) == part
    assert world.desk.state.wanted == ()
    assert not await link.upload_part(digest, part)
    assert await link.push_entry(entry) == ()

    page = await link.read_log(0)
    assert page.entries == (entry,)
    assert page.rosters == (world.desk.state.roster,)
    assert page.base == world.desk.checkpoint
    assert (await link.read_log(1)).entries == ()
    assert world.desk.store.node(link._key.public).credit_tokens == 16


async def test_an_uncertified_record_changes_nothing(world):
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(4)
    entry = world.decide(link, roster, [b"x" * 9], lease)
    forged = replace(entry, certificate=replace(entry.certificate, signatures=()))
    assert await link.push_entry(forged) == ()
    assert world.desk.store.entry_count == 0
    stub, metadata = link._stub, link._metadata()
    for data in (b"", b"{}", b"\xff", canonical.to_bytes(entry)[:-1], canonical.to_bytes(entry) + b" "):
        assert await status_of(stub.PushEntry(wire.PushEntryRequest(entry=data), metadata=metadata)) == (
            INVALID,
            Code.FIELD.code,
        )


async def test_a_record_with_weight_that_was_never_granted_gets_no_credit(world):
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(4)
    for forged in (
        replace(lease, range=replace(lease.range, stop=lease.range.stop + 1)),
        replace(lease, range=replace(lease.range, pass_number=1)),
        replace(lease, signature=""),
    ):
        await link.push_entry(world.decide(link, roster, [b"x" * 9], forged))
    assert world.desk.store.entry_count == 0
    assert "record 0: " in world.desk.state.events[-1][1]
    await link.push_entry(world.decide(link, roster, [b"x" * 9], lease))
    assert world.desk.store.entry_count == 1


async def test_a_node_with_another_head_is_asked_for_its_records_and_a_fork_is_taken_back(world):
    link, roster = await world.training()
    one, other = await link.acquire_leases(1), await link.acquire_leases(1)
    ours, theirs = (world.decide(link, roster, [b"x" * 9], lease) for (lease,) in (one, other))
    await link.push_entry(ours)
    beat = Beat("training", head=next_head(ours.record))
    assert (await link.heartbeat(beat)).astray_from is None
    news = await link.heartbeat(replace(beat, head=next_head(theirs.record)))
    assert news.astray_from == 0
    await link.push_entry(theirs)
    assert "certified two records of round 0" in world.desk.state.events[-1][1]
    assert [effect.round for effect in world.desk.effects if isinstance(effect, machine.BranchOff)] == [0]


async def test_the_log_is_read_in_bounded_pages(world, monkeypatch):
    monkeypatch.setattr(door, "PAGE_ENTRIES_MAX", 3)
    link, roster = await world.training()
    for number in range(5):
        (lease,) = await link.acquire_leases(1)
        await link.push_entry(world.decide(link, roster, [b"%d" % number], lease))
    assert [len((await link.read_log(start)).entries) for start in (0, 3, 5)] == [3, 2, 0]
    monkeypatch.setattr(door, "PAGE_BYTES_MAX", 1)
    assert len((await link.read_log(0)).entries) == 1  # never none, or a reader would stand still


async def test_wrong_uploads_are_refused_and_leave_nothing(world):
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(4)
    part = bytes(BLOB_CHUNK_BYTES + 5)
    digest = digest_of(part)
    assert (await refused(link.upload_part(digest, part))).reason is Code.BLOB_MISSING  # no record names it
    await link.push_entry(world.decide(link, roster, [part], lease))
    wrong = part[:-1] + b"\1"
    assert (await refused(link.upload_part(digest, wrong))).reason is Code.BLOB_CORRUPT
    assert (await refused(link.upload_part(digest, part[:-1]))).reason is Code.FIELD
    assert (await refused(link.upload_part(digest, part + b"\0"))).reason is Code.FIELD
    stub, metadata = link._stub, link._metadata()
    chunk = {"digest": digest, "size": len(part)}
    for chunks, code in (
        ([], Code.FIELD),
        ([{"digest": "../../etc/passwd", "size": 5, "data": b"x"}], Code.FIELD),
        ([chunk | {"data": b""}], Code.LIMIT),
        ([chunk | {"data": part}], Code.LIMIT),
        ([chunk | {"data": part[:9], "offset": 7}], Code.BLOB_CORRUPT),
        ([chunk | {"data": part[:9]}], Code.BLOB_CORRUPT),
    ):
        upload = stub.WriteBlob(iter([wire.BlobChunk(**fields) for fields in chunks]), metadata=metadata)
        assert (await status_of(upload))[1] == code.code
    assert world.desk.state.wanted
    assert list((world.desk.folder / "blobs" / "partial").iterdir()) == []
    assert await link.upload_part(digest, part)


async def test_what_a_member_is_asked_to_show_is_taken_from_it_alone_and_is_served_to_nobody(world):
    world.desk.auditor = auditor = world.desk.audits(share=1.0)
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(8)
    shown = codec("int4").encode(np.ones(PARAMETERS, np.float32))
    digest = digest_of(shown)
    entry = world.decide(link, roster, [b"x" * 9], lease, update=digest)
    assert (await refused(link.upload_part(digest, shown))).reason is Code.BLOB_MISSING  # nobody has asked
    await link.push_entry(entry)
    told = Beat("training", epoch=roster.epoch, known_round=1)
    news = await link.heartbeat(told, wait_seconds=10)
    assert (news.asked, news.wanted) == ((digest,), (digest_of(b"x" * 9),))
    stranger = await world.member()
    assert (await refused(stranger.upload_part(digest, shown))).reason is Code.BLOB_MISSING
    assert (await stranger.heartbeat(Beat("joining"))).asked == ()
    assert (await refused(link.upload_part(digest, shown[1:]))).reason is Code.FIELD
    assert (await refused(link.upload_part(digest, shown[:-1] + b"\1"))).reason is Code.BLOB_CORRUPT
    assert await link.upload_part(digest, shown)
    assert auditor.blobs.read(digest) == shown and not world.desk.blobs.has(digest)
    assert (await link.heartbeat(told)).asked == ()
    assert (await refused(link.upload_part(digest, shown))).reason is Code.BLOB_MISSING
    call = stranger._stub.ReadBlob(wire.ReadBlobRequest(digest=digest), metadata=stranger._metadata())
    assert (await status_of(call.read()))[1] == Code.BLOB_MISSING.code


async def test_what_a_mean_was_made_of_is_asked_of_its_reducer_alone_and_is_served_to_nobody(world):
    world.desk.recounter = recounter = world.desk.recounts(share=1.0)
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(8)
    shown = bytes(99)
    evidence = BlobRef(digest_of(shown), 99)
    await link.push_entry(world.decide(link, roster, [b"x" * 9], lease, evidence=evidence))
    told = Beat("training", epoch=roster.epoch, known_round=1)
    assert (await link.heartbeat(told, wait_seconds=10)).asked == (evidence.digest,)
    stranger = await world.member()
    assert (await stranger.heartbeat(Beat("joining"))).asked == ()
    assert (await refused(stranger.upload_part(evidence.digest, shown))).reason is Code.BLOB_MISSING
    assert (await refused(link.upload_part(evidence.digest, shown[1:]))).reason is Code.FIELD
    assert await link.upload_part(evidence.digest, shown)
    assert recounter.blobs.read(evidence.digest) == shown and (await link.heartbeat(told)).asked == ()
    call = stranger._stub.ReadBlob(wire.ReadBlobRequest(digest=evidence.digest), metadata=stranger._metadata())
    assert (await status_of(call.read()))[1] == Code.BLOB_MISSING.code


async def test_two_uploads_of_one_part_at_once_store_it_once(world):
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(4)
    part = bytes(5 * BLOB_CHUNK_BYTES)
    await link.push_entry(world.decide(link, roster, [part], lease))
    stored = await asyncio.gather(*(link.upload_part(digest_of(part), part) for _ in range(3)))
    assert sorted(stored) == [False, False, True]


async def test_an_upload_that_dribbles_is_ended_and_leaves_nothing(world, monkeypatch):
    monkeypatch.setattr(transfers, "CHUNK_SECONDS_MAX", 0.2)
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(4)
    part = bytes(99)
    await link.push_entry(world.decide(link, roster, [part], lease))

    async def dribble():
        yield wire.BlobChunk(digest=digest_of(part), size=99, data=part[:1])
        await asyncio.sleep(5)

    upload = link._stub.WriteBlob(dribble(), metadata=link._metadata())
    assert await status_of(upload) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Code.LIMIT.code)
    assert list((world.desk.folder / "blobs" / "partial").iterdir()) == []
    assert await link.upload_part(digest_of(part), part)


async def test_a_blob_is_fetched_whole_with_progress(world, tmp_path):
    link = await world.member()
    store, seen = BlobStore(tmp_path / "node"), []
    ref = world.desk.checkpoint.blob
    await link.fetch_blob(ref, store, lambda done, size: seen.append((done, size)))
    assert store.read(ref.digest) == b"base" * 300_000
    assert seen[-1] == (ref.size, ref.size)
    assert all(later[0] > earlier[0] for earlier, later in pairwise(seen))
    await link.fetch_blob(ref, store, lambda *_: pytest.fail("it is here already"))


async def test_a_cut_download_goes_on_where_it_stopped(world, tmp_path, monkeypatch):
    link = await world.member()
    store, ref, offsets = BlobStore(tmp_path / "node"), world.desk.checkpoint.blob, []
    whole = world.service._read_blob

    async def cut(session, request, context):
        offsets.append(request.offset)
        if len(offsets) > 2:
            return await whole(session, request, context)
        data = (b"base" * 300_000)[request.offset :][:BLOB_CHUNK_BYTES]
        await context.write(wire.BlobChunk(data=data, offset=request.offset, digest=ref.digest, size=ref.size))
        return await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    monkeypatch.setattr(world.service, "_read_blob", cut)
    await link.fetch_blob(ref, store)
    assert offsets == [0, BLOB_CHUNK_BYTES, 2 * BLOB_CHUNK_BYTES]
    assert store.has(ref.digest)


def astray(how, offset, ref):
    """What a server says that does not answer what it was asked; none when it says nothing."""
    data = (b"base" * 300_000)[offset:][:BLOB_CHUNK_BYTES]
    right = wire.BlobChunk(data=data, offset=offset, digest=ref.digest, size=ref.size)
    wrong = {
        "from the start": wire.BlobChunk(data=(b"base" * 300_000)[:BLOB_CHUNK_BYTES], offset=0, size=ref.size),
        "another place": wire.BlobChunk(data=data, offset=offset + 1, size=ref.size),
        "another size": wire.BlobChunk(data=data, offset=offset, size=ref.size + 1),
        "other bytes": wire.BlobChunk(data=b"x" * BLOB_CHUNK_BYTES, offset=offset, size=ref.size),
        "right, then other bytes": wire.BlobChunk(data=b"x", offset=offset + 7, size=ref.size),
        "nothing": None,
    }[how]
    return [right, wrong] if how.startswith("right") else [each for each in (wrong,) if each is not None]


@pytest.mark.parametrize(
    "how", ["from the start", "another place", "another size", "other bytes", "right, then other bytes"]
)
async def test_a_wrong_answer_is_asked_for_again_from_the_last_right_byte(how, world, tmp_path, monkeypatch):
    link = await world.member()
    store, ref, offsets = BlobStore(tmp_path / "node"), world.desk.checkpoint.blob, []
    whole = world.service._read_blob

    async def answer(session, request, context):
        offsets.append(request.offset)
        if len(offsets) == 2:
            for chunk in astray(how, request.offset, ref):
                await context.write(chunk)
        else:
            await (whole if len(offsets) > 2 else first)(session, request, context)

    async def first(session, request, context):
        data = b"base" * (BLOB_CHUNK_BYTES // 4)
        await context.write(wire.BlobChunk(data=data, offset=0, digest=ref.digest, size=ref.size))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    monkeypatch.setattr(world.service, "_read_blob", answer)
    await link.fetch_blob(ref, store)
    again = 2 if how.startswith("right") else 1
    assert offsets == [0, BLOB_CHUNK_BYTES, again * BLOB_CHUNK_BYTES]
    store.verify(ref.digest)


@pytest.mark.parametrize("how", ["another place", "another size", "other bytes", "nothing"])
async def test_a_server_that_keeps_answering_wrong_is_refused_and_nothing_of_it_is_kept(
    how, world, tmp_path, monkeypatch
):
    link = await world.member()
    store, ref = BlobStore(tmp_path / "node"), world.desk.checkpoint.blob

    async def answer(session, request, context):
        for chunk in astray(how, request.offset, ref):
            await context.write(chunk)

    monkeypatch.setattr(world.service, "_read_blob", answer)
    assert (await refused(link.fetch_blob(ref, store))).reason is Code.BLOB_CORRUPT
    assert not store.has(ref.digest) and store.bytes_used == 0


async def test_a_download_that_was_stopped_goes_on_with_another_process(world, tmp_path):
    link = await world.member()
    ref, offsets = world.desk.checkpoint.blob, []

    class Stopped(Exception):
        pass

    def stop(done, size):
        if done > 2 * BLOB_CHUNK_BYTES:
            raise Stopped

    with pytest.raises(Stopped):
        await link.fetch_blob(ref, BlobStore(tmp_path / "node"), stop)
    store = BlobStore(tmp_path / "node")
    await link.fetch_blob(ref, store, lambda done, size: offsets.append(done))
    assert offsets[0] == 2 * BLOB_CHUNK_BYTES + transfers.PIECE_BYTES  # whole chunks are kept
    assert store.has(ref.digest)


async def test_a_session_lost_in_a_download_is_opened_again(world, tmp_path):
    link = await world.member()
    world.service._end_session(link._key.public)
    await link.fetch_blob(world.desk.manifest.manifest.tokenizer, BlobStore(tmp_path / "node"))


async def test_a_corrupted_blob_is_refused_and_not_kept(world, tmp_path):
    link = await world.member()
    store, ref = BlobStore(tmp_path / "node"), world.desk.checkpoint.blob
    path = world.desk.blobs.path(ref.digest)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"!")
    assert (await refused(link.fetch_blob(ref, store))).reason is Code.BLOB_CORRUPT  # the hashes lead elsewhere
    path.write_bytes(good)
    assert not store.has(ref.digest)
    await link.fetch_blob(ref, store)


async def test_bytes_that_are_not_the_leaves_are_stopped_at_the_first_wrong_chunk(world, tmp_path, monkeypatch):
    link = await world.member()
    store, ref, seen = BlobStore(tmp_path / "node"), world.desk.checkpoint.blob, []
    leaves = world.desk.blobs.leaves(ref.digest)
    monkeypatch.setattr(world.desk.blobs, "leaves", lambda digest: leaves)
    data = bytearray(b"base" * 300_000)
    data[BLOB_CHUNK_BYTES + 3] ^= 1
    world.desk.blobs.path(ref.digest).write_bytes(data)
    refusal = await refused(link.fetch_blob(ref, store, lambda done, size: seen.append(done)))
    assert refusal.reason is Code.BLOB_CORRUPT
    assert BLOB_CHUNK_BYTES <= max(seen) < 2 * BLOB_CHUNK_BYTES
    assert not store.has(ref.digest)
    world.desk.blobs.path(ref.digest).write_bytes(b"base" * 300_000)
    await link.fetch_blob(ref, store)


async def test_only_the_runs_own_blobs_are_served(world, tmp_path):
    link = await world.member()
    store = BlobStore(tmp_path / "node")
    await link.fetch_blob(world.desk.manifest.manifest.tokenizer, store)
    for ref in (world.desk.heldout, world.desk.blobs.put_bytes(b"something else")):
        assert (await refused(link.fetch_blob(ref, store))).reason is Code.BLOB_MISSING
    for digest in ("", "../coordinator.db", "AA" * 32):
        call = link._stub.ReadBlob(wire.ReadBlobRequest(digest=digest), metadata=link._metadata())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is INVALID
    ref = world.desk.checkpoint.blob
    call = link._stub.ReadBlob(wire.ReadBlobRequest(digest=ref.digest, offset=ref.size + 1), metadata=link._metadata())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is INVALID


# names


@pytest.mark.parametrize(
    ("wished", "shown"),
    [
        ("", None),
        ("\x00\x1b\u200b\u202e", None),
        ("  My \t\n box  ", "My box"),
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("'; DROP TABLE nodes;--", "'; DROP TABLE nodes;--"),
        ("abc\u202edef\u200bghi\x00", "abcdefghi"),
        ("e\u0301toile", "\u00e9toile"),
        ("x" * 10_000, "x" * 40),
        ("a" + "\u0301" * 50, "\u00e1\u0301\u0301"),
        ("\U0001f9a6 otter", "\U0001f9a6 otter"),
    ],
)
async def test_a_hostile_name_becomes_one_that_can_be_shown(world, wished, shown):
    link = world.link()
    opened = await link.open(life=1, invite=world.invite(), name=wished)
    assert opened.signed_pass.body.name == (shown or generated_name(link._key.public))


@pytest.mark.parametrize("twin", ["Heron", "heron", "h\u0435ron", "her0n", "he\u0301ron", "HERON ", "h e r o n"])
def test_a_name_that_looks_like_anothers_gets_a_part_of_the_key(twin):
    name = distinct_name(twin, "ab" * 32, ["heron"])
    assert name.endswith("-abababab")
    assert len(name) <= 40


def test_nobody_is_called_coordinator():
    assert distinct_name("C\u043eordinator", "ab" * 32, []) != "C\u043eordinator"
    assert len(distinct_name("x" * 40, "ab" * 32, ["x" * 40])) == 40
    assert distinct_name("heron", "ab" * 32, ["otter"]) == "heron"


def test_generated_names_are_two_words_that_stay():
    assert generated_name("ab" * 32) == generated_name("ab" * 32)
    assert visible(generated_name("cd" * 32)).count("-") == 1


async def test_who_tries_again_soon_does_not_look_at_the_certificate_again_until_it_was_let_in(world, monkeypatch):
    looks, look = [], tls.fetch_pinned
    monkeypatch.setattr(tls, "fetch_pinned", lambda *given, **more: looks.append(1) or look(*given, **more))
    link = world.link()
    for _ in range(2):
        assert (await refused(link.open(life=1))).reason is Code.NOT_ADMITTED
    await link.open(life=1, invite=world.invite())
    assert len(looks) == 1
    await link.open(life=2)
    assert len(looks) == 2
    link.door = replace(link.door, endorsed=10**15)  # it has heard of a newer one meanwhile
    link._pins[address.parse(link.door.addresses[0])] = tls.Pinned(b"", "", 7), math.inf
    assert (await refused(link.open(life=3))).reason is Code.PIN_MISMATCH
    assert len(looks) == 3


def test_a_door_is_kept_and_found_again(tmp_path):
    kept = Door(("127.0.0.1:1",), "00" * 32, identity.run_id(Key.generate().public, "test"))
    kept.save(tmp_path / "door.json")
    assert Door.load(tmp_path / "door.json") == kept
