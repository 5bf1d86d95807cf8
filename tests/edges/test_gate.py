"""The gate before a real door: raw sockets and real links over loopback."""

import asyncio
import random
import ssl
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc
import psutil
import pytest
import test_service
from test_service import refused

from coordinator import gate as gates
from coordinator import service as door
from coordinator.core import quotas
from node.link import Beat
from protocol.errors import Code, Refused
from protocol.v1 import barnraise_pb2 as wire

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty settings
NOISE = random.Random(7).randbytes(4096)

world = test_service.world


async def knock(world, *, tls=False, first=b""):
    """A connection by hand."""
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection("127.0.0.1", world.server.port, ssl=context)
    writer.write(first)
    return reader, writer


async def hung_up_on(reader, *, seconds):
    """Whether the other side ends it in this time, whatever it says before."""
    try:
        async with asyncio.timeout(seconds):
            while await reader.read(1 << 16):
                pass
    except (ConnectionError, ssl.SSLError):
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    ("tls", "first"),
    [
        (False, NOISE),
        (False, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (True, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (True, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(512)),  # a hello of another TLS inside
        (True, NOISE),
    ],
)
async def test_what_does_not_speak_our_protocol_is_hung_up_on_in_time(world, tls, first):
    link = await world.member()
    reader, writer = await knock(world, tls=tls, first=first)
    assert await hung_up_on(reader, seconds=5)
    writer.close()
    await link.heartbeat(Beat("training"))
    assert not world.service.refusals


def test_strangers_write_nothing_into_the_log():
    """In a process of its own: gRPC reads how much it shall say when it is first imported."""
    script = """
import coordinator.service as door, grpc, socket, sys
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
from protocol import tls
folder = Path(sys.argv[1])
from protocol.identity import Key, run_id
key = Key.generate()
tls.make_certificate(folder / "k", folder / "c", [], tls.Owner(key, run_id(key.public, "test"), 1))
server = grpc.server(ThreadPoolExecutor(1))
pair = ((folder / "k").read_bytes(), (folder / "c").read_bytes())
port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
server.start()
for _ in range(3):
    with socket.create_connection(("127.0.0.1", port)) as noise:
        noise.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n" * 100)
        while noise.recv(4096): pass
server.stop(None)
"""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("name", ["a ? and %41", "x" * 100])
async def test_nobody_but_us_gets_to_the_door_past_the_gate(name):
    """Whatever the folder is called: gRPC reads addresses, and those of sockets are short."""
    with tempfile.TemporaryDirectory() as short:
        folder = Path(short).resolve() / name
        folder.mkdir()
        async with test_service.a_world(folder) as world:
            await world.member()
            sockets = world.server.gate.folder
            assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
            assert [path.name for path in sockets.iterdir()] == ["door"]
            assert sockets.is_relative_to(folder) is (len(name) < 100)
            ports = {each.laddr.port for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN"}
            assert ports == {world.server.port}
        assert not sockets.exists() and not (folder / "door").exists()


async def test_strangers_without_a_session_have_their_time_and_members_stay(world, monkeypatch):
    monkeypatch.setattr(gates, "STRANGER_SECONDS", 0.4)
    link = await world.member()
    connection = world.service._session_of[link._key.public].passage.name
    reader, writer = await knock(world, tls=True, first=PREFACE)
    assert await hung_up_on(reader, seconds=3)
    writer.close()
    await link.heartbeat(Beat("training"))
    assert world.service._session_of[link._key.public].passage.name == connection


async def test_so_many_strangers_may_be_there_and_then_no_more_until_one_has_gone(world, monkeypatch):
    link = await world.member()
    monkeypatch.setattr(gates, "STRANGERS_MAX", 8)
    crowd = [await knock(world) for _ in range(20)]
    ends = await asyncio.gather(*(hung_up_on(reader, seconds=1) for reader, _ in crowd))
    assert ends == [False] * 8 + [True] * 12
    assert world.server.gate.refused["strangers"] == 12
    await link.heartbeat(Beat("training"))
    for _, writer in crowd:
        writer.close()
    await asyncio.sleep(0.1)
    await world.member()


async def test_a_network_that_connects_too_often_is_refused_before_any_handshake(world):
    link = await world.member()
    world.server.gate._crowd = quotas.Crowd(quotas.CONNECTIONS_OF_A_BLOCK, quotas.Rate(5, 0.01))
    crowd = [await knock(world) for _ in range(30)]
    ends = await asyncio.gather(*(hung_up_on(reader, seconds=1) for reader, _ in crowd))
    assert sum(ends) == 25
    assert world.server.gate.refused["rate"] == 25
    await link.heartbeat(Beat("training"))
    for _, writer in crowd:
        writer.close()


async def test_whoever_goes_on_after_refusals_is_hung_up_on(world, monkeypatch):
    monkeypatch.setattr(quotas, "STRANGERS_REFUSALS", quotas.Rate(3, 0.01))
    member, stranger = await world.member(), world.link()
    await stranger._connect()
    codes = []
    for _ in range(4):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stranger._stub.ReadLog(wire.ReadLogRequest())
        codes.append(caught.value.code())
    assert codes == [grpc.StatusCode.UNAUTHENTICATED] * 3 + [grpc.StatusCode.UNAVAILABLE]
    await member.heartbeat(Beat("training"))


async def test_a_member_that_was_hung_up_on_comes_back_with_its_leases_and_its_place(world, monkeypatch):
    monkeypatch.setattr(quotas, "REFUSALS", quotas.Rate(2, 0.01))
    monkeypatch.setattr(quotas, "AWAY_SECONDS", 0.3)
    link, roster = await world.training()
    (lease,) = await link.acquire_leases(4)
    for _ in range(2):
        assert (await refused(link.acquire_leases(0))).reason is Code.FIELD
    assert (await refused(link.acquire_leases(0))).reason is Code.UNREACHABLE
    async with asyncio.timeout(10):
        while True:
            try:
                news = await link.heartbeat(Beat("training", epoch=roster.epoch, lease_ids=(lease.lease_id,)))
                break
            except Refused as refusal:
                assert refusal.reason is Code.UNREACHABLE
                await asyncio.sleep(0.1)
    assert news.renewed == (lease.lease_id,)
    assert news.roster is None  # nothing has changed for it
    assert world.desk.state.silent == {}


async def test_a_node_has_one_connection(world):
    older = await world.member()
    newer = world.again(older)
    await newer.open(life=2)
    await asyncio.sleep(0.1)
    assert len(world.server.gate._passages) == 1
    await newer.heartbeat(Beat("training"))


async def test_a_peer_that_has_vanished_without_a_word_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "STRANGER_SECONDS", 60.0)
    quick = {
        "grpc.keepalive_time_ms": 1000,
        "grpc.http2.ping_timeout_ms": 500,
        "grpc.server_handshake_timeout_ms": 500,
    }
    monkeypatch.setattr(door, "OPTIONS", tuple((name, quick.get(name, value)) for name, value in door.OPTIONS))
    async with test_service.a_world(tmp_path) as world:
        link = await world.member()
        half, half_writer = await knock(world, first=b"\x16\x03\x01")  # a handshake that does not go on
        mute, mute_writer = await knock(world, tls=True, first=PREFACE)  # never answers a ping
        assert await hung_up_on(half, seconds=4)
        assert await hung_up_on(mute, seconds=4)
        half_writer.close()
        mute_writer.close()
        await link.heartbeat(Beat("training"))


async def test_a_reader_that_takes_nothing_costs_no_memory(world):
    link = await world.member()
    ref = world.desk.blobs.put_bytes(bytes(32 << 20))
    world.desk.checkpoint = world.desk.checkpoint.__class__(0, "", "", ref)
    call = link._stub.ReadBlob(wire.ReadBlobRequest(digest=ref.digest), metadata=link._metadata())
    await call.read()
    await asyncio.sleep(0.5)
    (passage,) = world.server.gate._passages
    assert passage._outer.get_write_buffer_size() < 2 << 20
    call.cancel()
