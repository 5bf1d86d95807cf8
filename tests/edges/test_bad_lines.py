"""A real link and door over a line that is slow, late and lossy; and what the lines of `make chaos PART=lines` do."""

import asyncio
import os

import pytest
import test_service

from coordinator import transfers
from coordinator.transfers import Transfers
from node.link import Beat
from protocol.blobs import BlobStore, digest_of
from protocol.errors import Code
from tests.bad_line import Line
from tests.chaos.line import Way, Weather

world = test_service.world


async def test_over_a_bad_line_a_node_joins_and_what_it_does_counts_once(world):
    line = Line(round_trip=0.6, jitter=1.0, loss=0.1, bytes_per_second=64_000 / 8)
    port = await line.lead("127.0.0.1", world.server.port)
    try:
        link = world.link(addresses=(f"127.0.0.1:{port}",))
        await link.open(life=1, invite=world.invite())
        news = await link.heartbeat(Beat("training"))
        (lease,) = await link.acquire_leases(4)
        part = os.urandom(20_000)
        entry = world.decide(link, news.roster.roster, [part], lease)
        assert await link.push_entry(entry) == (digest_of(part),)
        await link.upload_part(digest_of(part), part)
        assert (await link.read_log(0)).entries == (entry,)
    finally:
        line.close()
    desk = world.desk
    assert desk.store.invites()[0].used == 1 and [each.node for each in desk.store.nodes()] == [link._key.public]
    assert desk.state.head.round == 1 == len(desk.store.entries()) and desk.store.has_part(digest_of(part))
    assert not desk.state.leases.of(link._key.public), "the one that it used is in the record"
    assert line.lost > 0, "else nothing was tried"


async def test_while_a_model_comes_over_the_slowest_line_a_heartbeat_is_answered_and_little_is_ahead_of_it(
    world, tmp_path, monkeypatch
):
    """All of it was handed over at once before, and the connection given up as its pings waited behind that."""
    line = Line(round_trip=0.1, jitter=0.1, loss=0.0, bytes_per_second=transfers.BYTES_PER_SECOND_MIN)
    handed, ahead = [], []
    port = await line.lead("127.0.0.1", world.server.port)
    send = Transfers.send

    async def counted(self, node, text, offset, act):
        async def counting(chunk):
            await act(chunk)
            handed.append(len(chunk.data))

        await send(self, node, text, offset, counting)

    monkeypatch.setattr(Transfers, "send", counted)
    try:
        link = world.link(addresses=(f"127.0.0.1:{port}",))
        await link.open(life=1, invite=world.invite())
        store, ref = BlobStore(tmp_path / "node"), world.desk.checkpoint.blob
        coming = asyncio.create_task(link.fetch_blob(ref, store, lambda done, _: ahead.append(sum(handed) - done)))
        while sum(handed) < 192 << 10:
            await asyncio.sleep(0.1)
        await link.heartbeat(Beat("syncing"))
        assert not coming.done()
        coming.cancel()
    finally:
        line.close()
    assert ahead and max(ahead) < 128 << 10


async def test_a_node_whose_line_is_too_slow_for_us_is_hung_up_on_and_has_its_model_all_the_same(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr(transfers, "CHUNK_SECONDS_MAX", 0.5)
    monkeypatch.setattr(transfers, "BYTES_PER_SECOND_MIN", 1 << 20)
    line = Line(round_trip=0.02, jitter=0.1, loss=0.0, bytes_per_second=400_000)
    port = await line.lead("127.0.0.1", world.server.port)
    try:
        link = world.link(addresses=(f"127.0.0.1:{port}",))
        await link.open(life=1, invite=world.invite())
        store, ref = BlobStore(tmp_path / "node"), world.desk.checkpoint.blob
        await link.fetch_blob(ref, store)
        store.verify(ref.digest)
        await link.close()
    finally:
        line.close()
    assert world.service.refusals[Code.LIMIT.code] >= 2


@pytest.mark.parametrize(
    ("weather", "what", "share"),
    [
        (Weather(loss=0.2), "lost", 0.2),
        (Weather(doubled=0.1), "doubled", 0.1),
        (Weather(delay=0.1, swapped=0.05), "swapped", 0.05),
        (Weather(bits_per_second=1_000_000, queue=0.5), "full", 0.5),  # twice as much comes as goes out
    ],
)
def test_the_line_of_make_chaos_does_to_packets_what_its_weather_says(weather, what, share):
    ways = [Way("7/0/out"), Way("7/0/out")]
    for way in ways:
        way.weather = weather
    sent = [number * 0.006 for number in range(10_000)]  # 1500 bytes each: 2 Mbit/s
    arrivals, again = ([way.arrivals(1500, now) for now in sent] for way in ways)
    assert arrivals == again, "the same seed, the same luck"
    assert abs(ways[0].counted[what] / len(sent) - share) < 0.02
    assert sum(map(len, arrivals)) == len(sent) + sum(
        ways[0].counted[what] * sign for what, sign in (("doubled", 1), ("lost", -1), ("full", -1))
    )
    came = [(at, now) for now, each in zip(sent, arrivals, strict=True) for at in each]
    assert all(at >= now for at, now in came) and (came == sorted(came)) == (what != "swapped")
