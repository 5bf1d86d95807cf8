"""The coordinator's quotas, held by a real door against real links over TLS on loopback."""

import asyncio
import math
import zlib

import grpc
import pytest
import test_service
from test_service import refused, status_of

from coordinator import transfers
from coordinator.core import quotas
from coordinator.core.strikes import Kind
from node import link as links
from node.link import Beat
from protocol import canonical, tls
from protocol.blobs import BlobStore
from protocol.errors import Code
from protocol.limits import PROTOCOL_VERSION
from protocol.v1 import barnraise_pb2 as wire

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED

world = test_service.world


def another_connection(world, options=(), **more):
    root = (world.desk.folder / "tls.pem").read_bytes()
    named = ("grpc.ssl_target_name_override", tls.SERVER_NAME)
    own = ("grpc.use_local_subchannel_pool", 1)
    return grpc.aio.secure_channel(world.address, grpc.ssl_channel_credentials(root), [named, own, *options], **more)


async def test_a_session_is_good_on_its_own_connection_only(world):
    link = await world.member()
    async with another_connection(world) as stolen:
        call = stolen.unary_unary("/barnraise.v1.Coordinator/ReadLog")
        answer = await status_of(call(wire.ReadLogRequest().SerializeToString(), metadata=link._metadata()))
        assert answer == (grpc.StatusCode.UNAUTHENTICATED, Code.SESSION.code)
    await link.heartbeat(Beat("training"))


async def test_too_many_joins_are_refused_with_the_time_to_wait_and_the_link_waits(world):
    world.service._joins = quotas.Crowd(quotas.Rate(1, 1), quotas.Rate(1, 0.5))
    first, second = world.link(), world.link()
    invites = [world.invite(), world.invite()]
    await first.open(life=1, invite=invites[0])
    asked = wire.ChallengeRequest(node=first._key.public, protocol=PROTOCOL_VERSION)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await first._stub.Challenge(asked)
    told = dict(caught.value.trailing_metadata())
    assert caught.value.code() is EXHAUSTED
    assert 0 < float(told["retry-after"]) <= 2
    await second.open(life=1, invite=invites[1])  # only later than it wished
    assert world.service.refusals[Code.BUSY.code] >= 2


async def test_a_member_that_calls_too_often_waits_and_the_others_do_not(world, monkeypatch):
    monkeypatch.setattr(quotas, "share", lambda members: quotas.Rate(2 + members / 2, 2 * members))  # of two: 3 and 4
    busy, other = await world.member(), await world.member()
    began = asyncio.get_running_loop().time()
    for _ in range(5):
        await busy.read_log(0)
    assert asyncio.get_running_loop().time() - began > 0.25
    assert world.service.refusals[Code.BUSY.code] >= 1
    refused_before = world.service.refusals[Code.BUSY.code]
    await other.read_log(0)
    assert world.service.refusals[Code.BUSY.code] == refused_before


async def test_a_coordinator_that_is_busy_for_ever_is_given_up(world, monkeypatch):
    link = await world.member()
    monkeypatch.setattr(quotas, "share", lambda members: quotas.Rate(1, 0.001))
    await link.read_log(0)
    monkeypatch.setattr(links, "BUSY_TRIES", 2)
    monkeypatch.setattr(links, "BUSY_SECONDS_MAX", 0.01)
    assert (await refused(link.read_log(0))).reason is Code.BUSY


async def test_a_call_over_quota_is_refused_before_anything_that_it_brings_is_read(world, monkeypatch):
    link = await world.member()
    call = link._channel.stream_unary("/barnraise.v1.Coordinator/PushEntry")

    async def nothing():
        await asyncio.sleep(60)
        yield b""

    monkeypatch.setattr(quotas, "share", lambda members: quotas.Rate(1, 0.001))
    await link.read_log(0)
    assert await status_of(call(nothing(), metadata=link._metadata())) == (EXHAUSTED, Code.BUSY.code)


@pytest.mark.parametrize("brought", [[], [b"\xff"]])
async def test_a_call_that_brings_no_message_of_its_own_is_refused_by_name(world, brought):
    link = await world.member()
    call = link._channel.stream_unary("/barnraise.v1.Coordinator/Heartbeat")
    answer = await status_of(call(iter(brought), metadata=link._metadata()))
    assert answer == (grpc.StatusCode.INVALID_ARGUMENT, Code.FIELD.code)


async def test_an_honest_heartbeat_overtakes_those_who_call_all_the_time(world, monkeypatch):
    hostile, honest = [await world.member() for _ in range(3)], await world.member()
    turns, served, whole = world.service._turns, [], world.service._heartbeat

    async def heartbeat(session, request):
        served.append(session.node)
        return await whole(session, request)

    async def stand_there(number):
        while len(turns._waiting) < number:
            await asyncio.sleep(0.01)

    monkeypatch.setattr(world.service, "_heartbeat", heartbeat)
    world.service._asked = quotas.Buckets(quotas.Rate(math.inf, 0.001))  # as if all came in no time
    monkeypatch.setattr(turns, "_per_second", 1e-6)
    calls = [asyncio.create_task(link.heartbeat(Beat("training"))) for link in hostile for _ in range(20)]
    await stand_there(59)  # and one is served
    calls.append(asyncio.create_task(honest.heartbeat(Beat("training"))))
    await stand_there(60)
    monkeypatch.setattr(turns, "_per_second", 1e6)
    turns._go_on()
    await asyncio.gather(*calls)
    assert served.index(honest._key.public) <= len(hostile)  # behind one of each at most


async def test_a_member_that_is_hung_up_on_stays_away_for_a_while_and_others_need_not(world, monkeypatch):
    monkeypatch.setattr(quotas, "REFUSALS", quotas.Rate(2, 0.01))
    monkeypatch.setattr(links, "BUSY_TRIES", 1)
    link = await world.member()
    for expected in (Code.FIELD, Code.FIELD, Code.UNREACHABLE):
        assert (await refused(link.acquire_leases(0))).reason is expected
    refusal = await refused(world.again(link).open(life=2))
    assert refusal.reason is Code.BUSY
    assert 0 < refusal.retry_seconds <= quotas.AWAY_SECONDS
    await world.member()


async def test_a_roster_is_written_once_however_many_ask_for_it(world, monkeypatch):
    await world.training()
    others = [await world.member() for _ in range(3)]
    signed, write, written = world.desk.state.roster, canonical.to_bytes, []

    def to_bytes(value):
        if value is signed:
            written.append(value)
        return write(value)

    monkeypatch.setattr(canonical, "to_bytes", to_bytes)
    world.service._written = None
    for each in (*others, others[0]):
        assert (await each.heartbeat(Beat("syncing"))).roster == signed
    assert len(written) == 1


async def test_a_node_that_downloads_the_run_over_and_over_has_to_wait(world, tmp_path, monkeypatch):
    monkeypatch.setattr(transfers, "DOWNLOAD_HOUR_BYTES_MIN", 0)
    monkeypatch.setattr(links, "BUSY_SECONDS_MAX", 0.01)
    thief, other = await world.member(), await world.member()
    ref, hour = world.desk.checkpoint.blob, 2 * world.desk.blobs.bytes_used
    for number in range(hour // ref.size):
        await thief.fetch_blob(ref, BlobStore(tmp_path / str(number)))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.7):
            await thief.fetch_blob(ref, BlobStore(tmp_path / "more"))
    assert world.service.refusals[Code.BUSY.code] >= 1
    await other.fetch_blob(ref, BlobStore(tmp_path / "other"))


async def test_a_reader_that_is_too_slow_is_hung_up_on_and_goes_on_later(world, tmp_path, monkeypatch):
    monkeypatch.setattr(transfers, "CHUNK_SECONDS_MAX", 0.3)
    link = await world.member()
    ref = world.desk.blobs.put_bytes(bytes(24 << 20))  # more than what gRPC and the kernel take at once
    monkeypatch.setattr(world.desk, "checkpoint", world.desk.checkpoint.__class__(0, "", "", ref))
    call = link._stub.ReadBlob(wire.ReadBlobRequest(digest=ref.digest), metadata=link._metadata())
    await call.read()
    await asyncio.sleep(0.8)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
    assert caught.value.code() is EXHAUSTED
    monkeypatch.setattr(transfers, "CHUNK_SECONDS_MAX", 60.0)
    await link.fetch_blob(ref, BlobStore(tmp_path / "node"))


async def test_a_compressed_message_is_refused(world):
    bomb = wire.ChallengeRequest(node="0" * (3 << 20), protocol=PROTOCOL_VERSION).SerializeToString()
    assert len(zlib.compress(bomb)) < 1 << 14
    async with another_connection(world, compression=grpc.Compression.Gzip) as channel:
        call = channel.unary_unary("/barnraise.v1.Coordinator/Challenge")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(bomb)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not world.service.refusals  # it never came to us
    await world.member()


@pytest.mark.parametrize("theirs", [0, PROTOCOL_VERSION + 1, 2**32 - 1])
async def test_any_other_protocol_version_is_told_both_and_what_to_type(world, monkeypatch, theirs):
    monkeypatch.setattr("node.link.PROTOCOL_VERSION", theirs)
    refusal = await refused(world.link().open(life=1, invite=world.invite()))
    assert refusal.reason is Code.VERSION
    assert f"protocol {theirs}" in refusal.what
    assert str(PROTOCOL_VERSION) in refusal.what
    assert "pip install --upgrade" in refusal.fix


async def test_a_call_that_does_not_exist_is_unknown_and_anothers_lease_is_not_renewed(world):
    mine, other = await world.training(), await world.member()
    (lease,) = await mine[0].acquire_leases(4)
    call = other._channel.unary_unary("/barnraise.v1.Coordinator/Ban")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"", metadata=other._metadata())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    news = await other.heartbeat(Beat("training", lease_ids=(lease.lease_id,)))
    assert news.renewed == ()
    news = await mine[0].heartbeat(Beat("training", lease_ids=(lease.lease_id,)))
    assert news.renewed == (lease.lease_id,)


async def test_who_is_banned_gets_no_more_of_a_model(world, tmp_path):
    link = await world.member()
    world.judge(link, Kind.BAN, "it sells the model")
    refusal = await refused(link.fetch_blob(world.desk.checkpoint.blob, BlobStore(tmp_path / "node")))
    assert refusal.reason is Code.BANNED
