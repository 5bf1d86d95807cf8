"""Averaging between real engines on loopback: what is agreed on, who is left out, and what a hostile peer achieves."""

import asyncio
import contextlib
import errno
import hashlib
import math
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import AsyncIterator as Stream  # noqa: UP035  # hivemind tells streams by this one's name

import numpy as np
import psutil
import pytest
import pytest_asyncio
from hivemind.p2p import P2PContext, PeerID, ServicerBase
from hivemind.proto import averaging_pb2, runtime_pb2
from hivemind.utils.asyncio import as_aiter

from coordinator.rendezvous import Rendezvous
from node.engine import AveragingJob, Engine
from node.p2p import GuardedP2P
from node.reduction import CODES
from node.swarm import FETCH_SILENCE_SECONDS, BarnraisePeer
from protocol import p2pd
from protocol.blobs import digest_of
from protocol.codec import codec
from protocol.errors import Code, Refused
from protocol.evidence import check_reduction, group_id, sign_part, sign_slices, vouched
from protocol.exchange import Packing
from protocol.identity import Key, libp2p_private_key_bytes, peer_id_of
from protocol.limits import ADDRESSES_MAX, CHUNK_VALUES, PEER_MESSAGE_BYTES_MAX
from protocol.robust import Rule, means
from protocol.types import BlobRef, Contribution, Digest, Exchange, Part, PeerId, Record, RunId
from protocol.v1 import barnraise_pb2
from tests.bad_line import Line
from tests.signing import KEYS, SigningEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")  # engines are shared

RUN = RunId("ab" * 32 + ".averaging")
LOCAL = "/ip4/127.0.0.1/tcp/0"
VALUES = 5 * CHUNK_VALUES + 1001  # an odd tail
SPANS = ((0, 2 * CHUNK_VALUES), (2 * CHUNK_VALUES, 4 * CHUNK_VALUES), (4 * CHUNK_VALUES, VALUES))
WEIGHTS = (1000, 3000, 2000)
PATIENCE_SECONDS = 5  # with a sender that says nothing, on a machine that does other things as well


def keep_blob(folder, digest, data):
    """Where a BlobStore keeps it."""
    (folder / digest[:2]).mkdir(exist_ok=True)
    (folder / digest[:2] / digest).write_bytes(data)


class Swarm:
    """Engines in folders of their own, and what they heard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.heard = defaultdict(list)

    async def engine(
        self,
        name: str,
        *,
        up="int4",
        down="int4",
        rule=Rule.MEAN,
        rendezvous=(),
        listen=(LOCAL,),
        coordinator="127.0.0.1",
        upload_bytes_per_second=None,
    ) -> Engine:
        home = self.folder / name
        (home / "blobs").mkdir(parents=True, exist_ok=True)
        if not (home / "identity").exists():
            (home / "identity").write_bytes(libp2p_private_key_bytes(Key.generate()))
        return await SigningEngine.start(
            runtime_dir=home / "run",
            identity_path=home / "identity",
            run=RUN,
            listen=listen,
            rendezvous=rendezvous,
            coordinator=coordinator,
            upload_bytes_per_second=upload_bytes_per_second,
            packing=Packing(codec(up), codec(down), rule),
            parameters=VALUES,
            blob_dir=home / "blobs",
            on_message=lambda peer, envelope: self.heard[name].append((peer, envelope)),
        )

    def will_be(self, name: str) -> PeerId:
        """Whom an engine of this name will be known as, before it has started."""
        home, key = self.folder / name, Key.generate()
        home.mkdir()
        (home / "identity").write_bytes(libp2p_private_key_bytes(key))
        return peer_id_of(bytes.fromhex(key.public))

    async def outsider(self, name: str, *, listen=(LOCAL,), announce=()) -> GuardedP2P:
        """A peer of the test's own making, that can say anything; the same one again under the same name."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        if not (home / "identity").exists():
            (home / "identity").write_bytes(libp2p_private_key_bytes(Key.generate()))
        p2p = await GuardedP2P.start(
            runtime_dir=home / "run", identity_path=home / "identity", listen=listen, announce=announce
        )
        p2p.may_dial = lambda address: True
        return p2p

    def sweep(self) -> None:
        """What was started here has ended; an outsider's sockets are nobody else's, nor a killed engine's."""
        for runtime in self.folder.glob("**/run"):
            p2pd.sweep(runtime)


@contextlib.asynccontextmanager
async def engines_of(swarm, count, **options):
    engines = await asyncio.gather(*(swarm.engine(f"engine-{index}", **options) for index in range(count)))
    try:
        await introduce(*engines)
        yield engines
    finally:
        await asyncio.gather(*(engine.stop() for engine in engines))


@contextlib.asynccontextmanager
async def joined_by_one(swarm, engines, **options):
    """Shared engines and one more, to which anything may happen."""
    more = await swarm.engine("one more", **options)
    try:
        await introduce(*engines, more)
        yield (*engines, more)
    finally:
        await more.stop()


async def introduce(*engines, others=()):
    roster = {engine.peer: engine.addresses for engine in engines} | {str(p.peer_id): p.addresses() for p in others}
    await asyncio.gather(*(engine.set_roster(roster) for engine in engines))


def job_of(*peers, **changes):
    job = AveragingJob(
        group=os.urandom(32),
        peers=tuple(map(PeerId, peers)),
        weights=WEIGHTS,
        exchange=Exchange.ALL_REDUCE,
        spans=SPANS,
        deadline_seconds=40,
        sender_seconds=20,  # everybody speaks, on a machine that may stand still for a while
        members=(),
        attempt=0,
    )
    return replace(job, **changes)


def vectors(count, seed=7):
    random = np.random.default_rng(seed)
    return [random.standard_normal(VALUES).astype(np.float32) * 1e-3 for _ in range(count)]


def mean_of(how, encoded, weights):
    total = sum(
        weight * how.decode(data, VALUES).astype(np.float64) for data, weight in zip(encoded, weights, strict=True)
    )
    return total / sum(weights)


def within_bound(how, got, wanted):
    peaks = np.abs(np.pad(wanted, (0, -wanted.size % 64)).reshape(-1, 64)).max(axis=1).repeat(64)[: wanted.size]
    return bool((np.abs(got - wanted) <= [how.error_max(peak) + 1e-9 for peak in peaks]).all())


@pytest.fixture
def swarm(tmp_path):
    swarm = Swarm(tmp_path)
    yield swarm
    swarm.sweep()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def int4_swarm(tmp_path_factory):
    """Three engines for all tests that leave them whole: each takes seconds to start."""
    swarm = Swarm(tmp_path_factory.mktemp("int4"))
    async with engines_of(swarm, 3) as engines:
        yield swarm, engines


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sparse_swarm(tmp_path_factory):
    async with engines_of(Swarm(tmp_path_factory.mktemp("sparse")), 3, up="sparse2") as engines:
        yield engines


@pytest_asyncio.fixture(loop_scope="module")
async def trio(int4_swarm):
    _, engines = int4_swarm
    await introduce(*engines)
    return engines


@pytest_asyncio.fixture(loop_scope="module")
async def sparse_trio(sparse_swarm):
    await introduce(*sparse_swarm)
    return sparse_swarm


@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
async def test_everyone_ends_with_the_same_bytes_of_the_weighted_mean(swarm, name):
    how = codec(name)
    encoded = [how.encode(vector) for vector in vectors(3)]
    async with engines_of(swarm, 3, up=name, down=name) as engines:
        job = job_of(*(engine.peer for engine in engines))
        outcomes = await asyncio.gather(
            *(engine.average(job, data) for engine, data in zip(engines, encoded, strict=True))
        )
        await asyncio.sleep(0.2)
        usages = await asyncio.gather(*(engine.usage() for engine in engines))
    assert all(outcome.failed == {} and outcome.included == (0, 1, 2) for outcome in outcomes)
    assert outcomes[0].parts == outcomes[1].parts == outcomes[2].parts
    wanted = mean_of(how, encoded, WEIGHTS)
    for index, (start, stop) in enumerate(SPANS):
        got = how.decode(outcomes[0].parts[index], stop - start)
        assert within_bound(how, got, wanted[start:stop])
    sizes = [how.encoded_bytes(stop - start) for start, stop in SPANS]
    for own, outcome in zip(sizes, outcomes, strict=True):  # the others' spans once, our own from two senders
        assert outcome.bytes_received == sum(sizes) - own + 2 * own
    assert sum(usage.sent for usage in usages) == sum(usage.received for usage in usages)
    assert sum(usage.sent for usage in usages) < 4 * sum(sizes) * 1.01


def spoilt(attack, vector):
    match attack:
        case "times 100":
            return vector * 100
        case "a sign flip":
            return vector * -20
        case "as large as the codec goes":
            return np.full_like(vector, 6e4)


async def test_each_reducer_applies_the_rule_to_its_span_and_a_shout_is_heard_like_a_word(swarm):
    how = codec("int4")
    async with engines_of(swarm, 3, rule=Rule.CLIP) as engines:
        for attack in ("times 100", "a sign flip", "as large as the codec goes"):
            brought = vectors(3)
            honest = mean_of(how, [how.encode(vector) for vector in brought], WEIGHTS)
            brought[0] = spoilt(attack, brought[0])
            encoded = [how.encode(vector) for vector in brought]
            job = job_of(*(engine.peer for engine in engines))
            outcomes = await asyncio.gather(
                *(engine.average(job, data) for engine, data in zip(engines, encoded, strict=True))
            )
            assert all(outcome.failed == {} and outcome.included == (0, 1, 2) for outcome in outcomes)
            assert outcomes[0].parts == outcomes[1].parts == outcomes[2].parts
            for index, (start, stop) in enumerate(SPANS):
                slices = [data[how.encoded_bytes(start) : how.encoded_bytes(stop)] for data in encoded]
                wanted = np.concatenate([m.copy() for _, m in means(Rule.CLIP, how, slices, WEIGHTS, stop - start)])
                assert outcomes[0].parts[index] == how.encode(wanted)
                peak = np.linalg.norm(how.decode(outcomes[0].parts[index], stop - start))
                assert peak < 2 * np.linalg.norm(honest[start:stop]), attack


async def test_over_bad_lines_members_average_the_same_bytes_and_each_counts_once(swarm, trio):
    """The third has such a line both ways: it calls the others, and they call it."""
    first, second, _ = trio
    third, lines = await swarm.engine("far"), []
    engines = (first, second, third)

    async def through(engine):
        """Where an engine is called over a bad line."""
        lines.append(line := Line(round_trip=0.3, jitter=0.5, loss=0.05, bytes_per_second=1_000_000, seed=len(lines)))
        port = await line.lead("127.0.0.1", int(engine.addresses[0].rpartition("/")[2]))
        return (f"/ip4/127.0.0.1/tcp/{port}",)

    encoded = [codec("int4").encode(vector) for vector in vectors(3)]
    job = job_of(*(engine.peer for engine in engines))
    try:
        await first.set_roster({second.peer: second.addresses, third.peer: await through(third)})
        await second.set_roster({first.peer: first.addresses, third.peer: await through(third)})
        await third.set_roster({first.peer: await through(first), second.peer: await through(second)})
        outcomes = await asyncio.gather(
            *(engine.average(job, payload) for engine, payload in zip(engines, encoded, strict=True))
        )
    finally:
        await third.stop()
        for line in lines:
            line.close()
    assert [outcome.included for outcome in outcomes] == [(0, 1, 2)] * 3 and not any(each.failed for each in outcomes)
    assert all(outcome.parts == outcomes[0].parts for outcome in outcomes) and len(outcomes[0].parts) == 3
    how, got = codec("int4"), b"".join(outcomes[0].parts[index] for index in range(3))
    assert within_bound(how, how.decode(got, VALUES), mean_of(how, encoded, WEIGHTS))
    assert sum(line.lost for line in lines) > 0, "else nothing was tried"


async def test_a_peer_without_weight_sends_nothing_and_still_reduces_and_gets_every_mean(trio):
    how = codec("int4")
    encoded = [how.encode(vector) for vector in vectors(3)]
    job = job_of(*(engine.peer for engine in trio), weights=(5, 0, 7))
    payloads = [encoded[0], b"", encoded[2]]
    outcomes = await asyncio.gather(*(engine.average(job, data) for engine, data in zip(trio, payloads, strict=True)))
    assert [outcome.included for outcome in outcomes] == [(0, 2)] * 3, [outcome.failed for outcome in outcomes]
    assert outcomes[0].parts == outcomes[1].parts == outcomes[2].parts and len(outcomes[0].parts) == 3


async def test_a_client_that_nobody_can_dial_takes_part_and_reduces_nothing(swarm, trio):
    encoded = codec("int4").encode(vectors(1)[0])
    client, peers = await swarm.engine("client", listen=()), trio[:2]
    try:
        await introduce(client, *peers)
        middle = 3 * CHUNK_VALUES
        spans = ((0, 0), (0, middle), (middle, VALUES))
        job = job_of(client.peer, *(engine.peer for engine in peers), spans=spans)
        outcomes = await asyncio.gather(*(engine.average(job, encoded) for engine in (client, *peers)))
    finally:
        await client.stop()
    assert client.addresses == () and outcomes[0].included == () and outcomes[1].included == (0, 1, 2)
    assert all(b"".join(outcome.parts[index] for index in (1, 2)) == encoded for outcome in outcomes)


async def test_where_nobody_who_trained_can_be_called_one_that_brings_nothing_makes_the_mean(swarm, trio):
    how = codec("int4")
    encoded = [how.encode(vector) for vector in vectors(2)]
    clients, helper = [await swarm.engine(f"client {index}", listen=()) for index in range(2)], trio[0]
    try:
        await introduce(*clients, helper)
        roster = {helper.peer: helper.addresses} | {client.peer: () for client in clients}
        await asyncio.gather(*(client.set_roster(roster, calls_only=True) for client in clients))
        spans = ((0, 0), (0, VALUES), (0, 0))
        job = job_of(clients[0].peer, helper.peer, clients[1].peer, spans=spans, weights=(5, 0, 7))
        sides = zip((clients[0], helper, clients[1]), (encoded[0], b"", encoded[1]), strict=True)
        outcomes = await asyncio.gather(*(engine.average(job, data) for engine, data in sides))
    finally:
        await asyncio.gather(*(client.stop() for client in clients))
    assert outcomes[1].included == (0, 2) and [outcome.failed for outcome in outcomes] == [{}] * 3
    assert outcomes[0].parts == outcomes[1].parts == outcomes[2].parts
    assert within_bound(how, how.decode(outcomes[0].parts[1], VALUES), mean_of(how, encoded, (5, 7)))


async def gather(engines, payloads, **changes):
    job = job_of(
        *(engine.peer for engine in engines),
        exchange=Exchange.ALL_GATHER,
        spans=((0, VALUES),) * len(engines),
        **changes,
    )
    return await asyncio.gather(*(engine.average(job, data) for engine, data in zip(engines, payloads, strict=True)))


async def test_in_an_all_gather_everyone_gets_everyones_bytes_and_sends_its_own_to_each(sparse_trio):
    how = codec("sparse2")
    encoded = [how.encode(vector) for vector in vectors(3)]
    outcomes = await gather(sparse_trio, encoded)
    for index, outcome in enumerate(outcomes):
        assert outcome.failed == {} and outcome.included == (index,)
        assert outcome.parts == dict(enumerate(encoded))
        assert outcome.bytes_sent == outcome.bytes_received == 2 * len(encoded[0])


async def test_in_an_all_gather_a_member_that_never_comes_costs_only_its_own_part(sparse_trio):
    how = codec("sparse2")
    encoded = [how.encode(vector) for vector in vectors(3)]
    job = job_of(
        *(engine.peer for engine in sparse_trio),
        exchange=Exchange.ALL_GATHER,
        spans=((0, VALUES),) * 3,
        deadline_seconds=20,
        sender_seconds=PATIENCE_SECONDS,
    )
    outcomes = await asyncio.gather(
        *(engine.average(job, data) for engine, data in zip(sparse_trio[:2], encoded[:2], strict=True))
    )
    for index, outcome in enumerate(outcomes):
        assert outcome.parts == dict(enumerate(encoded[:2])) and list(outcome.failed) == [2]
        assert outcome.included == (index,)


async def test_a_chunk_where_an_all_gather_wants_none_is_a_violation(swarm, sparse_trio):
    how = codec("sparse2")
    encoded = [how.encode(vector) for vector in vectors(2)]
    hostile = await swarm.outsider("hostile")
    try:
        engines = sparse_trio[:2]
        await introduce(*engines, others=[hostile])
        hostile.roster = {PeerID.from_base58(engine.peer): engine.addresses for engine in engines}
        job = job_of(
            *(engine.peer for engine in engines),
            str(hostile.peer_id),
            exchange=Exchange.ALL_GATHER,
            spans=((0, VALUES),) * 3,
            deadline_seconds=20,
            sender_seconds=PATIENCE_SECONDS,
        )
        pushed = chunk(encoded[0][:1344], group=job.group, codec_code=CODES["sparse2"])
        *outcomes, answers = await asyncio.gather(
            *(engine.average(job, data) for engine, data in zip(engines, encoded, strict=True)),
            replies(hostile, engines[0], [pushed]),
        )
    finally:
        await hostile.shutdown()
    assert [answer.code for answer in answers] == [averaging_pb2.PROTOCOL_VIOLATION]
    assert all(outcome.parts == dict(enumerate(encoded)) for outcome in outcomes)


class Shower(ServicerBase):
    """A member that answers everybody with what it likes."""

    said: list

    async def rpc_aggregate_part(
        self, stream: Stream[averaging_pb2.AveragingData], context: P2PContext
    ) -> Stream[averaging_pb2.AveragingData]:
        for message in self.said:
            yield message


Shower.__name__ = BarnraisePeer.__name__  # a part of the wire


async def test_in_an_all_gather_bytes_that_no_codec_reads_are_told_of_whoever_has_weight_and_nothing_else(
    swarm, sparse_trio
):
    how = codec("sparse2")
    encoded = [how.encode(vector) for vector in vectors(3)]
    hostile, shower = await swarm.outsider("shower"), Shower()
    size = how.encoded_bytes(12 * CHUNK_VALUES)
    assert len(encoded[2]) < size, "one message holds all of it"
    bad, part = b"\xff\x7e" + encoded[2][2:], averaging_pb2.AVERAGED_PART
    cases = {
        "a NaN magnitude": (chunk(bad, code=part, codec_code=CODES["sparse2"]), WEIGHTS, (2,)),
        "another codec": (chunk(encoded[2], code=part, codec_code=CODES["int4"]), WEIGHTS, (2,)),
        "it brings nothing": (chunk(bad, code=part, codec_code=CODES["sparse2"]), (*WEIGHTS[:2], 0), ()),
        "it cannot": (averaging_pb2.AveragingData(code=averaging_pb2.INTERNAL_ERROR), WEIGHTS, ()),
        "nothing": (chunk(encoded[2], code=part, codec_code=CODES["sparse2"]), WEIGHTS, ()),
    }
    try:
        await shower.add_p2p_handlers(hostile, namespace=RUN)
        engines = sparse_trio[:2]
        await introduce(*engines, others=[hostile])
        hostile.roster = {PeerID.from_base58(engine.peer): engine.addresses for engine in engines}
        for what, (said, weights, garbled) in cases.items():
            shower.said = [said]
            job = job_of(
                *(engine.peer for engine in engines),
                str(hostile.peer_id),
                weights=weights,
                exchange=Exchange.ALL_GATHER,
                spans=((0, VALUES),) * 3,
                sender_seconds=PATIENCE_SECONDS,
            )
            outcomes = await asyncio.gather(
                *(engine.average(job, data) for engine, data in zip(engines, encoded, strict=False))
            )
            assert [outcome.garbled for outcome in outcomes] == [garbled] * 2, what
            assert all((2 in outcome.parts) == (what == "nothing") for outcome in outcomes), what
    finally:
        await hostile.shutdown()


async def test_sparse_contributions_reduced_to_dense_means_agree_to_the_bit(sparse_trio):
    up, down = codec("sparse2"), codec("int4")
    encoded = [up.encode(vector) for vector in vectors(3)]
    job = job_of(*(engine.peer for engine in sparse_trio))
    outcomes = await asyncio.gather(
        *(engine.average(job, data) for engine, data in zip(sparse_trio, encoded, strict=True))
    )
    assert [outcome.failed for outcome in outcomes] == [{}] * 3
    assert outcomes[0].parts == outcomes[1].parts == outcomes[2].parts
    wanted = mean_of(up, encoded, WEIGHTS)
    for index, (start, stop) in enumerate(SPANS):
        assert within_bound(down, down.decode(outcomes[0].parts[index], stop - start), wanted[start:stop])


async def test_what_sparse_means_leave_out_goes_into_those_after_them_once_a_record_has_taken_them(swarm):
    how = codec("sparse2")
    first, second = ([how.encode(vector) for vector in vectors(3, seed)] for seed in (7, 8))
    async with engines_of(swarm, 3, up="sparse2", down="sparse2") as engines:

        async def averaged(encoded, after=b""):
            job = job_of(*(engine.peer for engine in engines), after=after)
            outcomes = await asyncio.gather(
                *(engine.average(job, data) for engine, data in zip(engines, encoded, strict=True))
            )
            assert outcomes[0].parts == outcomes[1].parts == outcomes[2].parts
            parts = [how.decode(outcomes[0].parts[index], stop - start) for index, (start, stop) in enumerate(SPANS)]
            return job.group, np.concatenate(parts)

        await averaged(second)
        taken, means = await averaged(first)
        await averaged(second)
        _, lost = await averaged(second, after=taken)  # no record took these, nor those before
        _, again = await averaged(second, after=taken)
        _, forgetful = await averaged(second)
        _, unknown = await averaged(second, after=taken)  # what the last averaging could not use is gone
    left = mean_of(how, first, WEIGHTS) - means
    alone = mean_of(how, second, WEIGHTS)
    assert (lost == again).all() and (forgetful == unknown).all()
    for got, of in ((again, alone + left), (forgetful, alone)):  # of equal magnitudes either may be kept
        best = np.concatenate([how.decode(how.encode(of[a:b].astype(np.float32)), b - a) for a, b in SPANS])
        assert np.square(got - of).sum() == pytest.approx(np.square(best - of).sum(), rel=1e-3)
    assert np.square(forgetful - (alone + left)).sum() > 1.01 * np.square(again - (alone + left)).sum()


async def test_an_early_bird_waits_for_the_others(trio):
    encoded = codec("int4").encode(vectors(1)[0])
    job = job_of(*(engine.peer for engine in trio))

    async def after(seconds, engine):
        await asyncio.sleep(seconds)
        return await engine.average(job, encoded)

    outcomes = await asyncio.gather(*(after(1.5 * index, engine) for index, engine in enumerate(trio)))
    assert all(outcome.failed == {} and outcome.included == (0, 1, 2) for outcome in outcomes)


def chunk(buffer, *, code=averaging_pb2.PART_FOR_AVERAGING, group=b"", codec_code=CODES["int4"], signature=""):
    part = runtime_pb2.Tensor(compression=codec_code, buffer=buffer)
    return averaging_pb2.AveragingData(code=code, group_id=group, tensor_part=part, peer_id=bytes.fromhex(signature))


def signed_chunks(data, span, group, *, by, bound=b""):
    """A whole slice, signed for the group (or for another)."""
    how = codec("int4")
    padded = bytes(how.encoded_bytes(span[0])) + data
    (signature,) = sign_slices(by, bound or group, padded, [span], how)
    good = [chunk(data[:34816], group=group, signature=signature)]
    return good + [chunk(data[at : at + 34816]) for at in range(34816, len(data), 34816)]


def whole(group):
    data = codec("int4").encode(np.zeros(CHUNK_VALUES, np.float32))
    return [chunk(data, group=group), chunk(data)]


def hostile_chunks(attack, group):
    good, rest = whole(group)
    buffer = good.tensor_part.buffer
    match attack:
        case "a NaN scale":
            return [chunk(b"\x00\x7e" + buffer[2:], group=group), rest]
        case "a wrong shape":
            return [chunk(buffer[:34], group=group), rest]
        case "a chunk too large":
            return [chunk(buffer + b"\0", group=group), rest]
        case "a message past the bound":
            return [chunk(bytes(PEER_MESSAGE_BYTES_MAX), group=group), rest]
        case "another codec":
            return [chunk(buffer, group=group, codec_code=CODES["fp16"]), rest]
        case "hivemind's own codec":
            return [chunk(buffer, group=group, codec_code=0), rest]
        case "only half":
            return [good]


ATTACKS = [
    "a NaN scale",
    "a wrong shape",
    "a chunk too large",
    "a message past the bound",
    "another codec",
    "hivemind's own codec",
    "only half",
]


GARBLED = {"a NaN scale", "a wrong shape", "a chunk too large", "another codec", "hivemind's own codec"}


async def replies(p2p, engine, messages):
    """What an engine answers to a stream of the test's making."""

    async def stream():
        for message in messages:
            yield message

    async with asyncio.timeout(15):
        peer = PeerID.from_base58(engine.peer)
        await p2p.reach(peer)
        got = await BarnraisePeer.get_stub(p2p, peer, namespace=RUN).rpc_aggregate_part(stream())
        return [message async for message in got]


async def test_a_hostile_member_is_left_out_and_the_round_goes_on(swarm, trio):
    how = codec("int4")
    encoded = [how.encode(vector) for vector in vectors(2)]
    hostile = await swarm.outsider("hostile")
    try:
        engines = trio[:2]
        await introduce(*engines, others=[hostile])
        hostile.roster = {PeerID.from_base58(engine.peer): engine.addresses for engine in engines}
        middle = 2 * CHUNK_VALUES
        for attack in ATTACKS:
            job = job_of(
                *(engine.peer for engine in engines),
                str(hostile.peer_id),
                spans=((0, middle), (middle, VALUES), (VALUES, VALUES)),
                deadline_seconds=40,
                sender_seconds=PATIENCE_SECONDS,
            )
            began = time.monotonic()
            *outcomes, answers = await asyncio.gather(
                *(engine.average(job, data) for engine, data in zip(engines, encoded, strict=True)),
                replies(hostile, engines[0], hostile_chunks(attack, job.group)),
            )
            assert outcomes[0].failed == outcomes[1].failed == {}, attack
            assert outcomes[0].included == outcomes[1].included == (0, 1), attack
            assert outcomes[0].parts == outcomes[1].parts, attack
            assert time.monotonic() - began < 2 * PATIENCE_SECONDS, attack  # the other engine waits once for it
            means = [answer for answer in answers if answer.code == averaging_pb2.AVERAGED_PART]
            assert bool(means) == (attack == "only half"), attack  # slow is not hostile
            assert outcomes[0].garbled == ((2,) if attack in GARBLED else ()) and outcomes[1].garbled == (), attack
    finally:
        await hostile.shutdown()


async def test_a_slice_that_its_sender_did_not_sign_for_this_group_counts_nowhere(swarm, trio):
    how = codec("int4")
    encoded, other = (how.encode(vector) for vector in vectors(2))
    hostile = await swarm.outsider("hostile")
    engine, (whole_span, none) = trio[0], ((0, VALUES), (VALUES, VALUES))
    own, stranger = KEYS[str(hostile.peer_id)], Key.generate()
    try:
        await introduce(engine, others=[hostile])
        hostile.roster = {PeerID.from_base58(engine.peer): engine.addresses}
        for attack in ("unsigned", "by another hand", "for another group", "other bytes", "well signed"):
            job = job_of(
                engine.peer,
                str(hostile.peer_id),
                weights=(5, 5),
                spans=(whole_span, none),
                sender_seconds=PATIENCE_SECONDS,
            )
            by = stranger if attack == "by another hand" else own
            bound = os.urandom(32) if attack == "for another group" else b""
            messages = signed_chunks(encoded, whole_span, job.group, by=by, bound=bound)
            if attack == "unsigned":
                messages[0].peer_id = b""
            if attack == "other bytes":
                messages[-1].tensor_part.buffer = other[-len(messages[-1].tensor_part.buffer) :]
            outcome, answers = await asyncio.gather(engine.average(job, encoded), replies(hostile, engine, messages))
            assert outcome.included == ((0, 1) if attack == "well signed" else (0,)), attack
            refused = [answer.code for answer in answers] == [averaging_pb2.PROTOCOL_VIOLATION]
            assert refused == (attack != "well signed"), attack
            assert outcome.parts == {0: encoded} and outcome.failed == {}, attack
            assert outcome.garbled == (() if attack == "well signed" else (1,)), attack
            outcome.evidence.unlink()
    finally:
        await hostile.shutdown()


async def test_what_a_reducer_keeps_proves_its_mean_right_and_another_wrong(trio):
    packing = Packing(codec("int4"), codec("int4"))
    encoded = [packing.up.encode(vector) for vector in vectors(3)]
    head = "12" * 32
    job = job_of(*(engine.peer for engine in trio), group=group_id(RUN, head, 0, 3), attempt=3)
    outcomes = await asyncio.gather(*(engine.average(job, data) for engine, data in zip(trio, encoded, strict=True)))
    keys = [KEYS[engine.peer] for engine in trio]
    nodes = tuple(key.public for key in keys)
    brought = tuple(Contribution(node, tokens, ()) for node, tokens in zip(nodes, WEIGHTS, strict=True))
    record = Record(RUN, 0, head, 0, nodes[0], brought, (), "34" * 32)
    for index, (outcome, key, (start, stop)) in enumerate(zip(outcomes, keys, SPANS, strict=True)):
        evidence = outcome.evidence.read_bytes()
        outcome.evidence.unlink()
        for mean, right in ((outcome.parts[index], True), (bytes(reversed(outcome.parts[index])), False)):
            kept = BlobRef(digest_of(evidence), len(evidence))
            part = Part(index, start, stop, digest_of(mean), len(mean), key.public, nodes, kept)
            part = sign_part(key, vouched(record, part))
            assert (check_reduction(record, part, evidence, packing) is None) is right


async def test_neither_a_weight_of_its_own_nor_a_chunk_too_many_gives_a_member_more_weight(swarm, trio):
    encoded = [codec("int4").encode(vector) for vector in vectors(2)]
    member = await swarm.outsider("heavy")
    engine, spans = trio[0], ((0, VALUES), (VALUES, VALUES))
    names = (engine.peer, str(member.peer_id))
    outcomes = []
    try:
        await introduce(engine, others=[member])
        member.roster = {PeerID.from_base58(engine.peer): engine.addresses}
        for weight, more in ((1.0, 0), (1e9, 0), (-3.0, 0), (math.nan, 0), (0.0, 0), (1.0, 3)):
            job = job_of(*names, weights=(3, 5), spans=spans)
            said = signed_chunks(encoded[1], (0, VALUES), job.group, by=KEYS[str(member.peer_id)])
            said += [chunk(said[0].tensor_part.buffer)] * more
            for each in said:
                each.weight = weight
            outcome, _ = await asyncio.gather(engine.average(job, encoded[0]), replies(member, engine, said))
            outcomes.append(outcome)
    finally:
        await member.shutdown()
    assert [(outcome.included, outcome.failed) for outcome in outcomes] == [((0, 1), {})] * len(outcomes)
    assert all(outcome.parts == outcomes[0].parts for outcome in outcomes)


async def test_a_hostile_sparse_contribution_is_left_out_whatever_is_wrong_with_it(swarm, sparse_trio):
    how = codec("sparse2")
    encoded = how.encode(vectors(1)[0])
    rows = CHUNK_VALUES // 4096  # of a chunk: their magnitudes come first, then highs
    wrong = {
        "nothing": (0, encoded[:2]),
        "a NaN magnitude": (0, b"\xff\x7e"),
        "magnitudes reversed": (0, b"\xff\x3f\x01\0"),
        "a position too few": (4 * rows, bytes(8)),
        "positions that do not rise": (4 * rows, b"\xff" * 8 + bytes(8)),
    }
    member = await swarm.outsider("sparse liar")
    engines, size = sparse_trio[:2], how.encoded_bytes(CHUNK_VALUES)
    try:
        await introduce(*engines, others=[member])
        member.roster = {PeerID.from_base58(engine.peer): engine.addresses for engine in engines}
        for what, (at, there) in wrong.items():
            said = encoded[:at] + there + encoded[at + len(there) :]
            job = job_of(
                *(engine.peer for engine in engines),
                str(member.peer_id),
                spans=((0, VALUES), (VALUES, VALUES), (VALUES, VALUES)),
                deadline_seconds=40,
                sender_seconds=PATIENCE_SECONDS,
            )
            (signature,) = sign_slices(KEYS[str(member.peer_id)], job.group, said, [(0, VALUES)], how)
            chunks = [chunk(said[at : at + size], codec_code=CODES["sparse2"]) for at in range(0, len(said), size)]
            chunks[0].group_id, chunks[0].peer_id = job.group, bytes.fromhex(signature)
            *outcomes, answers = await asyncio.gather(
                *(engine.average(job, encoded) for engine in engines), replies(member, engines[0], chunks)
            )
            good = what == "nothing"
            assert outcomes[0].included == ((0, 1, 2) if good else (0, 1)), what
            assert outcomes[0].parts == outcomes[1].parts and outcomes[0].failed == {}, what
            assert any(each.code == averaging_pb2.AVERAGED_PART for each in answers) == good, what
            assert outcomes[0].garbled == (() if good else (2,)), what
    finally:
        await member.shutdown()


async def test_a_second_stream_of_a_member_is_refused_and_the_first_counts(swarm, trio):
    encoded = codec("int4").encode(vectors(1)[0])
    member = await swarm.outsider("member")
    try:
        engine = trio[0]
        await introduce(engine, others=[member])
        member.roster = {PeerID.from_base58(engine.peer): engine.addresses}
        spans = ((0, VALUES), (VALUES, VALUES))
        job = job_of(engine.peer, str(member.peer_id), weights=(0, 5), spans=spans)
        begun, answered = asyncio.Event(), asyncio.Event()
        good = signed_chunks(encoded, (0, VALUES), job.group, by=KEYS[str(member.peer_id)])

        async def second():
            await begun.wait()
            await asyncio.sleep(1.0)  # for the first message to arrive
            try:
                return await replies(member, engine, whole(job.group))
            finally:
                answered.set()

        async def slowly():
            async def stream():
                for message in good:
                    yield message
                    begun.set()
                    await answered.wait()

            peer = PeerID.from_base58(engine.peer)
            await member.reach(peer)
            got = await BarnraisePeer.get_stub(member, peer, namespace=RUN).rpc_aggregate_part(stream())
            return [message async for message in got]

        outcome, answers, refused = await asyncio.gather(engine.average(job, b""), slowly(), second())
    finally:
        await member.shutdown()
    assert outcome.included == (1,) and outcome.parts == {0: encoded}
    assert b"".join(answer.tensor_part.buffer for answer in answers) == encoded
    assert [answer.code for answer in refused] == [averaging_pb2.PROTOCOL_VIOLATION]


async def test_a_stranger_gets_nothing(swarm):
    stranger = await swarm.outsider("stranger")
    try:
        async with engines_of(swarm, 1) as (engine,):
            digest = "cd" * 32
            keep_blob(swarm.folder / "engine-0" / "blobs", digest, b"secret")
            peer = PeerID.from_base58(engine.peer)
            stranger.roster = {peer: engine.addresses}
            await stranger.reach(peer)
            stub = BarnraisePeer.get_stub(stranger, peer, namespace=RUN)
            before = await engine.usage()
            letter = barnraise_pb2.PeerEnvelope(kind="Ready", body=bytes(1 << 20))
            assert [ack async for ack in await stub.rpc_message(as_aiter(letter))] == []
            request = barnraise_pb2.PartRequest(digest=digest, size=6)
            assert [part async for part in await stub.rpc_part(request)] == []
            assert await replies(stranger, engine, whole(os.urandom(32))) == []
            assert await engine.usage() == before  # no byte of it was read
    finally:
        await stranger.shutdown()
    assert swarm.heard["engine-0"] == []


async def test_two_that_call_each_other_at_once_reach_each_other_every_time(swarm):
    """Members of a round all do so when it begins."""
    first, second = await swarm.outsider("first"), await swarm.outsider("second")
    first.roster, second.roster = ({each.peer_id: each.addresses()} for each in (second, first))
    try:
        for _ in range(
            150
        ):  # one in thirty failed, and all in the seconds after it, where both dialled from their own ports
            await asyncio.gather(first.reach(second.peer_id), second.reach(first.peer_id))
            for one, other in ((first, second), (second, first)):
                await one._client.disconnect(other.peer_id)
            while await first._is_here(second.peer_id) or await second._is_here(first.peer_id):
                await asyncio.sleep(0.01)
    finally:
        await asyncio.gather(first.shutdown(), second.shutdown())


async def test_a_member_of_the_roster_outside_the_group_is_refused(swarm, trio):
    encoded = codec("int4").encode(vectors(1)[0])
    first, second, _ = trio
    outsider = await swarm.outsider("outsider")
    try:
        await introduce(first, second, others=[outsider])
        outsider.roster = {PeerID.from_base58(first.peer): first.addresses}
        job = job_of(first.peer, second.peer, weights=(1, 1), spans=((0, VALUES), (VALUES, VALUES)))
        one, two, answers = await asyncio.gather(
            first.average(job, encoded),
            second.average(job, encoded),
            replies(outsider, first, whole(job.group)),
        )
        unknown = await replies(outsider, first, whole(os.urandom(32)))
    finally:
        await outsider.shutdown()
    assert one.parts == two.parts == {0: encoded} and one.included == (0, 1)
    assert [answer.code for answer in answers + unknown] == [averaging_pb2.BAD_GROUP_ID] * 2


async def test_a_reply_arrives_whole_though_its_caller_says_later_that_it_has_said_all(swarm):
    """p2pd resets a stream whose handler is gone when something more comes in, and forgets what is still on its way."""
    replies = 4
    server, caller = await swarm.outsider("server"), await swarm.outsider("caller")
    try:
        server.roster, caller.roster = {caller.peer_id: ()}, {server.peer_id: server.addresses()}

        async def answer(stream, context):
            await anext(stream)
            for _ in range(replies):
                yield chunk(bytes(100_000))

        async def requests():
            yield averaging_pb2.AveragingData()
            await asyncio.sleep(0.5)

        streams = {"stream_input": True, "stream_output": True}
        await server.add_protobuf_handler("answer", answer, averaging_pb2.AveragingData, **streams)
        await caller.reach(server.peer_id)
        got = await caller.iterate_protobuf_handler(server.peer_id, "answer", requests(), averaging_pb2.AveragingData)
        await anext(got)
        await asyncio.sleep(1.0)  # the rest waits in sockets and streams
        assert len([message async for message in got]) == replies - 1
    finally:
        await asyncio.gather(server.shutdown(), caller.shutdown())


async def test_when_one_engine_is_killed_mid_round_the_others_finish_their_spans_and_say_which_failed(swarm, trio):
    encoded = [codec("int4").encode(vector) for vector in vectors(3)]
    async with joined_by_one(swarm, trio[:2]) as engines:
        job = job_of(*(engine.peer for engine in engines), sender_seconds=PATIENCE_SECONDS)
        started = [asyncio.create_task(engine.average(job, encoded[0])) for engine in engines[:2]]
        await asyncio.sleep(0.5)  # the third has not begun: it is dialled, and its share is awaited
        os.kill(engines[2].pid, signal.SIGKILL)
        one, two = await asyncio.gather(*started)
        assert await engines[2].closed == -signal.SIGKILL
        with pytest.raises(Refused):
            await engines[2].average(job, encoded[2])
    assert one.parts == two.parts and set(one.parts) == {0, 1}
    assert set(one.failed) == set(two.failed) == {2}
    assert one.included == two.included == (0, 1)


async def test_a_frozen_engine_costs_its_own_span_only(swarm, trio):
    encoded = codec("int4").encode(vectors(1)[0])
    async with joined_by_one(swarm, trio[:2]) as engines:
        job = job_of(*(engine.peer for engine in engines), deadline_seconds=10, sender_seconds=2)
        for process in [psutil.Process(engines[2].pid), *psutil.Process(engines[2].pid).children()]:
            process.suspend()
        outcomes = await asyncio.gather(*(engine.average(job, encoded) for engine in engines[:2]))
        os.kill(engines[2].pid, signal.SIGKILL)
    assert all(set(outcome.parts) == {0, 1} and set(outcome.failed) == {2} for outcome in outcomes)
    assert outcomes[0].parts == outcomes[1].parts
    assert all(outcome.seconds < 10.5 for outcome in outcomes)


async def test_nothing_is_sent_for_a_job_that_is_wrong(trio):
    encoded = codec("int4").encode(vectors(1)[0])
    engine = trio[0]
    alone = job_of(engine.peer, weights=(1,), spans=((0, VALUES),))
    wrong = [
        (alone, encoded[:-1], Code.UPDATE_BAD),
        (replace(alone, spans=((0, VALUES - 1),)), encoded, Code.FIELD),
        (replace(alone, weights=(1, 2)), encoded, Code.FIELD),
        (replace(alone, exchange=Exchange.ALL_GATHER, spans=((0, CHUNK_VALUES),)), encoded, Code.FIELD),
        (
            job_of("12D3KooWDC1Kfp31q8noa7BTRA8oKCXm3ZKYQYfZGKFgL7rpwGSg", weights=(1,), spans=((0, VALUES),)),
            encoded,
            Code.FIELD,
        ),
    ]
    for job, payload, code in wrong:
        with pytest.raises(Refused) as caught:
            await engine.average(job, payload)
        assert caught.value.reason is code
    assert (await engine.average(alone, encoded)).parts == {0: encoded}
    with pytest.raises(Refused):
        await engine.average(alone, encoded)  # a group is averaged once


async def test_a_group_given_up_returns_at_once_with_what_is_complete(trio):
    encoded = codec("int4").encode(vectors(1)[0])
    job = job_of(*(engine.peer for engine in trio))
    waiting = asyncio.create_task(trio[0].average(job, encoded))
    await asyncio.sleep(0.3)
    await trio[0].cancel(job.group)
    outcome = await waiting
    assert outcome.parts == {} and set(outcome.failed) == {0, 1, 2} and outcome.seconds < 2


async def test_a_message_arrives_with_the_sender_that_libp2p_proved(swarm, trio):
    envelope = barnraise_pb2.PeerEnvelope(sender="ab", kind="Ready", body=b"x" * 100_000).SerializeToString()
    async with joined_by_one(swarm, trio[:1]) as (first, second):
        await first.send(second.peer, envelope, timeout_seconds=5)
        with pytest.raises(Refused) as large:
            await first.send(second.peer, bytes(PEER_MESSAGE_BYTES_MAX + 1), timeout_seconds=5)
        await second.set_roster({})
        with pytest.raises(Refused) as unknown:
            await first.send(second.peer, envelope, timeout_seconds=5)
        os.kill(second.pid, signal.SIGKILL)
        with pytest.raises(Refused) as gone:
            await first.send(second.peer, envelope, timeout_seconds=5)
    assert swarm.heard["one more"] == [(first.peer, envelope)]
    assert large.value.reason is Code.LIMIT
    assert unknown.value.reason is gone.value.reason is Code.UNREACHABLE


async def test_a_part_is_fetched_whole_or_refused(int4_swarm, trio):
    data, digest = os.urandom(700_001), Digest("5e" * 32)
    swarm, (first, second, _) = int4_swarm[0], trio
    blobs = swarm.folder / "engine-1" / "blobs"
    keep_blob(blobs, digest, data)
    (blobs / "aa").mkdir()
    (blobs / "aa" / ("aa" * 32)).symlink_to(swarm.folder / "engine-1" / "identity")
    assert await first.fetch_part(second.peer, digest, len(data), timeout_seconds=10) == data
    missing = [
        (digest, len(data) - 1),
        (Digest("00" * 32), 10),
        (Digest("../identity"), 68),
        (Digest("aa" * 32), 68),
    ]
    for name, size in missing:
        with pytest.raises(Refused):
            await first.fetch_part(second.peer, name, size, timeout_seconds=5)


async def test_a_part_comes_in_pieces_that_64_kbits_carry_before_they_are_a_silence(swarm, int4_swarm, trio):
    digest, (giver, *_) = Digest("6e" * 32), trio
    keep_blob(int4_swarm[0].folder / "engine-0" / "blobs", digest, bytes(700_001))
    asker = await swarm.outsider("asker")
    try:
        await giver.set_roster({str(asker.peer_id): asker.addresses()})
        asker.roster = {PeerID.from_base58(giver.peer): giver.addresses}
        await asker.reach(PeerID.from_base58(giver.peer))
        stub = BarnraisePeer.get_stub(asker, PeerID.from_base58(giver.peer), namespace=RUN)
        request = barnraise_pb2.PartRequest(digest=digest, size=700_001)
        sizes = [len(part.data) async for part in await stub.rpc_part(request)]
    finally:
        await asker.shutdown()
    assert sum(sizes) == 700_001 and max(sizes) <= 64_000 / 8 * FETCH_SILENCE_SECONDS / 2


async def test_a_frozen_peer_is_not_waited_for_as_long_as_a_slow_one(swarm, trio):
    async with joined_by_one(swarm, trio[:1]) as (first, second):
        keep_blob(swarm.folder / "one more" / "blobs", digest := Digest("5e" * 32), bytes(1000))
        await first.fetch_part(second.peer, digest, 1000, timeout_seconds=60)
        psutil.Process(second.pid).suspend()
        began = time.monotonic()
        with pytest.raises(Refused):
            await first.fetch_part(second.peer, digest, 1000, timeout_seconds=600)
        assert time.monotonic() - began < 300
        os.kill(second.pid, signal.SIGKILL)


async def test_a_peer_that_moved_is_found_through_the_rendezvous(swarm):
    home = swarm.folder / "rendezvous"
    home.mkdir()
    (home / "identity").write_bytes(libp2p_private_key_bytes(Key.generate()))
    meeting = await Rendezvous.start(runtime_dir=home / "run", identity_path=home / "identity", run=RUN, listen=[LOCAL])
    try:
        # Peers are known from their keys, so they are rostered before they start.
        await meeting.set_roster([swarm.will_be("engine-0"), swarm.will_be("engine-1")])
        first = await swarm.engine("engine-0", rendezvous=meeting.addresses)
        second = await swarm.engine("engine-1", rendezvous=meeting.addresses)
        try:
            roster = {first.peer: first.addresses, second.peer: ("/ip4/127.0.0.1/tcp/1",)}
            await asyncio.gather(first.set_roster(roster), second.set_roster(roster))
            await asyncio.sleep(1)
            envelope = barnraise_pb2.PeerEnvelope(kind="Ready").SerializeToString()
            await first.send(second.peer, envelope, timeout_seconds=15)
        finally:
            await asyncio.gather(first.stop(), second.stop())
    finally:
        await meeting.stop()
    assert swarm.heard["engine-1"] == [(first.peer, envelope)]


async def test_a_peer_is_not_looked_for_nearer_than_the_coordinator_is(swarm):
    """Whom the roster names at addresses of this machine or network is called only in a run of this machine."""
    knocks = asyncio.Queue()
    doors = [
        await asyncio.start_server(lambda _, writer: (knocks.put_nowait(1), writer.close()), host, 0)
        for host in ("127.0.0.1", "127.0.0.2")
    ]
    ports = [door.sockets[0].getsockname()[1] for door in doors]
    nobody = peer_id_of(Key.generate().public_bytes)
    names = tuple(
        each
        for port in ports
        for each in (f"/ip4/127.0.0.1/tcp/{port}", f"/ip4/127.0.0.2/tcp/{port}", f"/dns4/localhost/tcp/{port}")
    )
    envelope = barnraise_pb2.PeerEnvelope(kind="Ready").SerializeToString()
    for coordinator, expected in (("10.1.2.3", False), ("127.0.0.1", True)):
        engine = await swarm.engine(f"engine-of-{coordinator}", coordinator=coordinator)
        try:
            await engine.set_roster({str(nobody): names[:ADDRESSES_MAX]})
            with pytest.raises(Refused) as caught:
                await engine.send(str(nobody), envelope, timeout_seconds=3)
            assert caught.value.reason is Code.UNREACHABLE
        finally:
            await engine.stop()
        assert (not knocks.empty()) == expected, coordinator
    for door in doors:
        door.close()


async def test_an_engine_sends_no_faster_than_its_owner_allows(swarm, trio):
    """A part of 400 kB over loopback, at 200 kB a second: the first second's worth goes at once."""
    data, asker = os.urandom(400_000), trio[0]
    digest = hashlib.sha256(data).hexdigest()
    giver = await swarm.engine("capped", upload_bytes_per_second=200_000.0)
    try:
        keep_blob(swarm.folder / "capped" / "blobs", digest, data)
        await introduce(asker, giver)
        began = time.monotonic()
        assert await asker.fetch_part(giver.peer, digest, len(data), timeout_seconds=20) == data
        assert time.monotonic() - began > 0.9
    finally:
        await giver.stop()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_temporary_folder_that_takes_no_sockets_is_named(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    home = tmp_path / ("long" * 30)
    with pytest.raises(Refused, match="no folder for sockets") as caught:
        p2pd.socket_folder(home)
    assert "TMPDIR" in caught.value.fix and not list(home.glob("sockets"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile._os, "mkdir", fail)
    with pytest.raises(Refused, match=os.strerror(number)):
        p2pd.socket_folder(home)


async def test_an_engine_that_hangs_is_ended(swarm, monkeypatch):
    engine = await swarm.engine("engine-that-hangs")
    try:
        monkeypatch.setattr("node.engine.GRACE_SECONDS", 0.2)
        os.kill(engine.pid, signal.SIGSTOP)
        for _ in range(3):
            assert not engine.closed.done(), "it may be busy"
            with pytest.raises(Refused, match="does not answer"):
                await engine._ask("usage", {}, seconds=0.1)
        assert await asyncio.wait_for(engine.closed, 5) == -signal.SIGKILL
    finally:
        await engine.stop()


def alive(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("victim", ["engine", "p2pd"])
async def test_a_killed_engine_leaves_no_p2pd_and_the_next_start_sweeps_its_sockets(swarm, victim):
    engine = await swarm.engine("engine-0")
    children = psutil.Process(engine.pid).children()
    assert [child.name() for child in children] == ["p2pd"]
    os.kill(engine.pid if victim == "engine" else children[0].pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        await engine.closed
        while any(map(alive, children)):
            await asyncio.sleep(0.05)
    run = swarm.folder / "engine-0" / "run"
    left = {path.name for path in run.glob("*.sock")}
    again = await swarm.engine("engine-0")
    assert again.peer == engine.peer
    assert not left & {path.name for path in run.glob("*.sock")}
    await again.stop()
    assert list(run.glob("*.sock")) == []


DAEMON = """
import asyncio, sys
from pathlib import Path
from node.engine import Engine
from protocol.codec import codec
from protocol.exchange import Packing

async def main(home):
    int4 = codec("int4")
    engine = await Engine.start(
        runtime_dir=home / "run", identity_path=home / "identity", run="run", listen=[], rendezvous=[], coordinator="",
        packing=Packing(int4, int4), parameters=1, blob_dir=home, on_message=print,
    )
    print(engine.pid, flush=True)
    await engine.closed

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_a_killed_daemon_leaves_neither_engine_nor_p2pd(tmp_path):
    (tmp_path / "identity").write_bytes(libp2p_private_key_bytes(Key.generate()))
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DAEMON, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        engine = psutil.Process(int(await daemon.stdout.readline()))
        family = [engine, *engine.children()]
        assert len(family) == 2
        daemon.kill()
        while any(map(alive, family)):
            await asyncio.sleep(0.05)
        await daemon.communicate()  # the engine had its output as well, which is closed only now
    p2pd.sweep(tmp_path / "run")  # as the next start does


async def test_a_port_that_is_taken_is_refused_by_name(swarm, trio):
    engine = trio[0]
    with pytest.raises(Refused) as caught:
        await swarm.engine("engine-1", listen=engine.addresses)
    assert caught.value.reason is Code.PORT_IN_USE


async def test_a_runtime_folder_with_a_long_name_is_no_obstacle(tmp_path):
    swarm = Swarm(tmp_path / ("long-" * 20))
    async with engines_of(swarm, 1) as (engine,):
        assert engine.addresses
        sockets = (swarm.folder / "engine-0" / "run" / "sockets").readlink()
        assert sockets.is_dir()
    assert not sockets.exists()
