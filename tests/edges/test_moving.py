"""A laptop goes from one network to another while its engine runs: in a network namespace of its own."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from node.engine import Engine
from protocol.codec import codec
from protocol.exchange import Packing
from protocol.identity import Key, libp2p_private_key_bytes

NAMESPACE = ("unshare", "--user", "--map-root-user", "--net")
HOME, AWAY = "10.77.0.1", "10.88.0.5"


def can_have_a_network():
    found = shutil.which("unshare") and shutil.which("ip")
    return bool(found) and subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_have_a_network(), reason="this machine lets nobody make a network namespace")
def test_a_node_says_where_it_is_after_its_address_has_changed(tmp_path):
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-m", "tests.edges.test_moving", tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()
    assert HOME in before and AWAY not in before
    assert AWAY in after and HOME not in after


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


if __name__ == "__main__":
    asyncio.run(move(Path(sys.argv[1])))
