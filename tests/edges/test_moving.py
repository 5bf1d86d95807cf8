"""A laptop goes from one network to another while its engine and its link run: in network namespaces of their own."""

import asyncio
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from node import link as links
from node.engine import Engine
from node.link import Beat, Door, Link
from protocol import invite
from protocol.codec import codec
from protocol.errors import Code, Refused
from protocol.exchange import Packing
from protocol.identity import Key, libp2p_private_key_bytes

NAMESPACE = ("unshare", "--user", "--map-root-user", "--net")
HOME, AWAY, COORDINATOR = "10.77.0.1", "10.88.0.5", "10.77.0.254"
KEEPALIVE_SECONDS = 1  # in this test for the 15 and 10 after which a silent connection is given up


def can_have_a_network():
    found = shutil.which("unshare") and shutil.which("ip")
    return bool(found) and subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


def in_a_network_of_its_own(part, folder):
    words = [*NAMESPACE, sys.executable, "-m", "tests.edges.test_moving", part, folder]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not can_have_a_network(), reason="this machine lets nobody make a network namespace")
def test_a_node_says_where_it_is_after_its_address_has_changed(tmp_path):
    said = in_a_network_of_its_own("engine", tmp_path)
    before, after = said.splitlines()
    assert HOME in before and AWAY not in before
    assert AWAY in after and HOME not in after


@pytest.mark.skipif(not can_have_a_network(), reason="this machine lets nobody make a network namespace")
def test_the_link_is_back_soon_after_its_address_has_changed(tmp_path):
    """In the middle of a heartbeat. The connection is dead, and says nothing: it is asked, and then given up."""
    said = in_a_network_of_its_own("link", tmp_path)
    assert float(said) < 10


def test_a_silent_connection_is_given_up_in_time_to_be_back_within_30_seconds():
    options = dict(links.OPTIONS)
    given_up = options["grpc.keepalive_time_ms"] + options["grpc.keepalive_timeout_ms"]
    assert given_up + links.RECONNECT_MS[1] < 30_000


def ip(*words):
    subprocess.run(["ip", *words], check=True)


async def move(folder):
    ip("link", "set", "lo", "up")
    ip("link", "add", "wifi", "type", "veth", "peer", "name", "router")
    for link in ("wifi", "router"):
        ip("link", "set", link, "up")
    ip("addr", "add", f"{HOME}/24", "dev", "wifi")
    (folder / "blobs").mkdir()
    (folder / "identity").write_bytes(libp2p_private_key_bytes(Key.generate()))
    engine = await Engine.start(
        runtime_dir=folder / "run",
        identity_path=folder / "identity",
        run="run",
        listen=("/ip4/0.0.0.0/tcp/0",),
        rendezvous=(),
        coordinator="127.0.0.1",
        packing=Packing(codec("int4"), codec("int4")),
        parameters=131072,
        blob_dir=folder / "blobs",
        on_message=print,
    )
    try:
        print(*engine.addresses)
        ip("addr", "del", f"{HOME}/24", "dev", "wifi")
        ip("addr", "add", f"{AWAY}/24", "dev", "wifi")
        while not any(AWAY in address for address in engine.addresses):
            await asyncio.sleep(0.5)
            await engine.usage()  # as with each heartbeat
        print(*engine.addresses)
    finally:
        await engine.stop()


def hasty(options):
    """Connections are asked for a sign of life every second, and may be."""
    hurry = {
        "grpc.keepalive_time_ms": 1000 * KEEPALIVE_SECONDS,
        "grpc.keepalive_timeout_ms": 1000 * KEEPALIVE_SECONDS,
        "grpc.http2.min_ping_interval_without_data_ms": 100,
    }
    return tuple((name, hurry.get(name, value)) for name, value in options)


async def roam(folder):
    """Tells how long after the move a heartbeat came through."""
    links.OPTIONS = hasty(links.OPTIONS)
    ip("link", "set", "lo", "up")
    ip("link", "add", "wifi", "type", "veth", "peer", "name", "router")
    ip("addr", "add", f"{HOME}/24", "dev", "wifi")
    ip("link", "set", "wifi", "up")
    serving = [sys.executable, "-m", "tests.edges.test_moving", "serve", str(folder)]
    with subprocess.Popen(["unshare", "--net", *serving], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as coordinator:
        try:
            assert coordinator.stdout.readline() == b"ready\n"
            ip("link", "set", "router", "netns", str(coordinator.pid))
            coordinator.stdin.write(b"go\n")
            coordinator.stdin.flush()
            text = coordinator.stdout.readline().decode().strip()
            link = Link(Door.of(invite.decode(text)), key=Key.generate(), transport_key=Key.generate())
            await link.open(life=1, invite=text)
            await link.heartbeat(Beat("training"))
            waiting = asyncio.create_task(link.heartbeat(Beat("training"), wait_seconds=30.0))
            await asyncio.sleep(0.5)
            ip("addr", "del", f"{HOME}/24", "dev", "wifi")
            ip("addr", "add", f"{AWAY}/24", "dev", "wifi")
            ip("route", "add", f"{COORDINATOR}/32", "dev", "wifi")
            moved = time.monotonic()
            while True:
                try:
                    await waiting
                    break
                except Refused as refused:
                    assert refused.reason is Code.UNREACHABLE
                    waiting = asyncio.create_task(link.heartbeat(Beat("training")))
            print(time.monotonic() - moved)
            await link.close()
        finally:
            coordinator.kill()


async def serve(folder):
    """A coordinator in a network of its own, which its parent puts an end of a cable into."""
    from tests.edges import test_service

    test_service.door.OPTIONS = hasty(test_service.door.OPTIONS)
    print("ready", flush=True)
    sys.stdin.readline()
    ip("link", "set", "lo", "up")
    for words in (("addr", "add", f"{COORDINATOR}/24"), ("addr", "add", "10.88.0.254/24"), ("link", "set", "up")):
        ip(*words, "dev", "router")
    async with test_service.a_world(folder, host=COORDINATOR) as world:
        print(world.invite(), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run({"engine": move, "link": roam, "serve": serve}[sys.argv[1]](Path(sys.argv[2])))
