"""Connections that are cut after so many bytes of every call, by a proxy between a real link and a real door."""

import asyncio

import pytest
import test_service

from node import link as links
from node.link import Beat
from protocol.blobs import BlobStore, digest_of
from protocol.errors import Code, Refused

world = test_service.world


class Proxy:
    """Passes bytes on until so many have gone by; then resets the connection."""

    def __init__(self):
        self.left = None  # bytes; none: it cuts nothing
        self.passed = 0
        self.writers = []

    async def listen(self, port):
        self.inner = port
        self.server = await asyncio.start_server(self._meet, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]

    async def _meet(self, reader, writer):
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.inner)
        ends = (writer, inner_writer)
        self.writers += ends
        await asyncio.gather(self._pass(reader, inner_writer, ends), self._pass(inner_reader, writer, ends))

    async def _pass(self, reader, writer, ends):
        try:
            while data := await reader.read(1 << 16):
                if self.left is not None and len(data) >= self.left:
                    writer.write(data[: self.left])
                    self.left = None
                    for end in ends:
                        end.transport.abort()
                    return
                if self.left is not None:
                    self.left -= len(data)
                self.passed += len(data)
                writer.write(data)
                await writer.drain()
            writer.close()
        except ConnectionError:
            for end in ends:
                end.transport.abort()

    def close(self):
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()


async def until_it_is_done(act):
    """Again and again, as a node does; tells the answer and how often it was cut."""
    cuts = 0
    async with asyncio.timeout(20):
        while True:
            try:
                return await act(), cuts
            except Refused as refusal:
                assert refusal.reason is Code.UNREACHABLE, refusal
                cuts += 1
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("share", [0.0, 0.35, 0.7, 0.99])
async def test_a_call_that_is_cut_anywhere_is_made_again_and_counts_once(world, tmp_path, monkeypatch, share):
    monkeypatch.setattr(links, "RECONNECT_MS", (100, 101))
    proxy = Proxy()
    port = await proxy.listen(world.server.port)
    link = world.link(addresses=(f"127.0.0.1:{port}",))
    invited, store = world.invite(), BlobStore(tmp_path / "node")
    sizes = {"open": 4000}
    cuts = 0

    async def cut(name, act):
        """Once with a cut after a share of the bytes that it takes, then until it is done."""
        nonlocal cuts
        proxy.left = max(1, int(share * sizes[name]))
        answer, count = await until_it_is_done(act)
        proxy.left = None
        cuts += count
        return answer

    async def size_of(name, act):
        before = proxy.passed
        answer = await act()
        sizes[name] = proxy.passed - before
        return answer

    await cut("open", lambda: link.open(life=1, invite=invited))
    assert world.desk.store.invites()[0].used == 1
    assert [node.node for node in world.desk.store.nodes()] == [link._key.public]

    beat = Beat("training")
    await size_of("heartbeat", lambda: link.heartbeat(beat))
    news = await cut("heartbeat", lambda: link.heartbeat(beat))
    roster = news.roster.roster
    assert len(roster.members) == 1

    await size_of("leases", lambda: link.acquire_leases(4))
    (lease,) = await cut("leases", lambda: link.acquire_leases(4))
    held = world.desk.state.leases.of(link._key.public)
    assert lease.lease_id in {each.lease_id for each in held} and len(held) <= 3  # one unheard of runs out by itself

    part = bytes(70_000)
    entry = world.decide(link, roster, [part], lease)
    sizes["push"] = sizes["leases"] + 1000
    missing = await cut("push", lambda: link.push_entry(entry))
    assert missing in ((), (digest_of(part),))
    assert world.desk.state.head.round == 1 == len(world.desk.store.entries())

    sizes["upload"] = len(part)
    await cut("upload", lambda: link.upload_part(digest_of(part), part))
    assert world.desk.store.has_part(digest_of(part)) and world.desk.blobs.read(digest_of(part)) == part

    await size_of("log", lambda: link.read_log(0))
    page = await cut("log", lambda: link.read_log(0))
    assert page.entries == (entry,)

    ref = world.desk.checkpoint.blob
    sizes["blob"] = ref.size
    await cut("blob", lambda: link.fetch_blob(ref, store))
    assert store.read(ref.digest) == world.desk.blobs.read(ref.digest)
    assert cuts >= 3  # else nothing was tried: a cut that falls behind a call meets the next one
    assert len(world.desk.store.nodes()) == 1
    proxy.close()
