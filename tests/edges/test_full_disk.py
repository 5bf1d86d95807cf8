"""A whole coordinator whose disk is full: what it still does, and how it goes on."""

import asyncio
import math
import os
import secrets
import subprocess
import sys
from types import SimpleNamespace

import grpc
import pytest
import test_coordinator_cli
from test_durability import files_of_at_most

from coordinator import engine
from coordinator.engine import Coordinator
from node.link import Beat, Door, Link
from protocol import blobs, invite, tls
from protocol.errors import Code, Refused
from protocol.identity import Key
from protocol.v1 import barnraise_pb2 as wire

ROOT = test_coordinator_cli.ROOT
published_once, published = test_coordinator_cli.published_once, test_coordinator_cli.published


class Lives:
    """One after the other, of a coordinator that is served as the command serves it."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.seen, self._asked = folder, [], SimpleNamespace(polite=asyncio.Event())
        opened = Coordinator.open

        async def seen(*given):
            self.seen.append(await opened(*given))
            return self.seen[-1]

        monkeypatch.setattr(Coordinator, "open", seen)

    async def __aenter__(self):
        self._ready = asyncio.Event()
        self._served = asyncio.create_task(
            engine.run(self.folder, stopper=self._asked, on_ready=lambda *_: self._ready.set())
        )
        await self.ready()
        return self

    async def __aexit__(self, *_):
        self._asked.polite.set()
        assert await self._served == 130

    async def ready(self):
        """Until the next one serves."""
        async with asyncio.timeout(60):
            await self._ready.wait()
        self._ready.clear()

    @property
    def newest(self):
        return self.seen[-1]

    def invite(self):
        token, until_ms = secrets.token_bytes(16), self.newest.now_ms() + 10**8
        self.newest.store.add_invite(token.hex(), uses=1, expires_ms=until_ms)
        issued = invite.issue(
            self.newest.key,
            addresses=(f"127.0.0.1:{self.newest.ports['grpc']}",),
            fingerprint=tls.fingerprint(self.folder.tls()[1].read_bytes()),
            name="tiny",
            token=token,
            uses=1,
            expires_ms=until_ms,
        )
        return invite.encode(issued)


async def test_a_coordinator_whose_disk_is_full_lets_nodes_have_blobs_says_so_and_goes_on_where_there_is_room(
    published, monkeypatch
):
    monkeypatch.setattr(engine, "DISK_SECONDS", 0.1)
    monkeypatch.setattr(blobs, "DISK_FREE_BYTES_MIN", 0)
    async with Lives(published, monkeypatch) as lives:
        text, keys = lives.invite(), {"key": Key.generate(), "transport_key": Key.generate()}
        link = Link(Door.of(invite.decode(text)), **keys)
        await link.open(life=1, invite=text)
        await link.heartbeat(Beat("training"))
        waiting = asyncio.create_task(link.heartbeat(Beat("training"), wait_seconds=30.0))
        with files_of_at_most(2048):
            for asked in (link.acquire_leases(4), waiting, link.heartbeat(Beat("training")), link.read_log(0)):
                assert await said(asked) == "the coordinator cannot write to its disk"
            sentence = lives.newest._sentence()
            assert sentence.startswith(Code.DISK_CAP.code) and str(published.path) not in sentence
            call = link._stub.Heartbeat(wire.HeartbeatRequest(activity="training"), metadata=link._metadata())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert ("retry-after", "0.100") in tuple(caught.value.trailing_metadata())
            newcomer = Link(Door.of(invite.decode(text)), key=Key.generate(), transport_key=Key.generate())
            assert await said(newcomer.open(life=1, invite=text)) == "the coordinator cannot write to its disk"
            await newcomer.close()
            base = lives.newest.base().blob
            assert await read(link, base) == lives.newest.blobs.read(base.digest)
            await asyncio.sleep(1)  # it has looked ten times
            assert len(lives.seen) == 1
        await lives.ready()
        assert [each.node for each in lives.newest.store.nodes()] == [keys["key"].public]
        await link.close()
        back = Link(Door((f"127.0.0.1:{lives.newest.ports['grpc']}",), link.door.fingerprint, link.door.run), **keys)
        await back.open(life=2)
        assert await back.acquire_leases(4)
        await back.close()


async def said(asked):
    with pytest.raises(Refused) as caught:
        await asked
    assert caught.value.reason is Code.UNREACHABLE
    assert caught.value.fix.startswith(f"Try again in {math.ceil(engine.DISK_SECONDS)} s;")
    return caught.value.what


async def read(link, ref):
    call = link._stub.ReadBlob(wire.ReadBlobRequest(digest=ref.digest), metadata=link._metadata())
    return b"".join([chunk.data async for chunk in call])


async def test_who_comes_first_to_a_coordinator_with_a_full_disk_is_not_told_of_a_disk_of_its_own(
    published, monkeypatch
):
    monkeypatch.setattr(blobs, "DISK_FREE_BYTES_MIN", 0)
    async with Lives(published, monkeypatch) as lives:
        text = lives.invite()
        link = Link(Door.of(invite.decode(text)), key=Key.generate(), transport_key=Key.generate())
        with files_of_at_most(2048):
            assert await said(link.open(life=1, invite=text)) == "the coordinator cannot write to its disk"
            assert lives.newest._sentence().startswith(Code.DISK_CAP.code)
            await link.close()


FULL = """
import subprocess, sys
from pathlib import Path
import numpy as np
from coordinator.evaluation import Evaluator
from protocol.errors import Code, Refused
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
path = folder / "vector"
path.touch()
try:
    Evaluator(None, path)._write(np.ones(1 << 20, np.float32))
except Refused as refused:
    assert refused.reason is Code.DISK_CAP, refused
else:
    raise AssertionError("it was written")
"""


def test_the_evaluators_numbers_are_refused_by_a_full_disk_and_no_signal_ends_the_coordinator(tmp_path):
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no mounts in a namespace of one's own here")
    inside = ["unshare", "-rm", sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(inside, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


async def test_a_coordinator_that_waits_for_its_disk_ends_when_it_is_asked_to(published, monkeypatch):
    monkeypatch.setattr(blobs.BlobStore, "has_room", lambda *_: False)
    async with Lives(published, monkeypatch) as lives:
        lives.newest._fail(Refused(Code.DISK_BAD, "it was taken away"))
        await asyncio.sleep(0.1)
        assert not lives._served.done()
    assert len(lives.seen) == 1
