"""The one port that strangers and members reach a node's engine by, and what floods, lies and oversize achieve there."""

import asyncio
import contextlib
import itertools
import json
import socket
import stat
import time
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from hivemind.averaging import DecentralizedAverager
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.utils.asyncio import as_aiter
from hivemind.utils.multiaddr import Multiaddr

from coordinator.rendezvous import RECORD_SECONDS_MAX, Rendezvous
from node.config import Settings
from node.p2p import CALLS_PER_PEER_MAX
from node.swarm import ADDRESS_CHARACTERS_MAX, RECORD_BYTES_MAX, BarnraisePeer, Directory, _addresses
from protocol import p2pd
from protocol.errors import Refused
from protocol.identity import Key, libp2p_private_key_bytes
from protocol.limits import ADDRESSES_MAX
from protocol.v1 import barnraise_pb2
from tests.edges.test_averaging import LOCAL, RUN, Swarm
from tests.stranger import Stranger

pytestmark = pytest.mark.asyncio(loop_scope="module")  # the engines are shared

LETTER = barnraise_pb2.PeerEnvelope(kind="Ready", body=bytes(1000))
FLAT_BYTES = 48 << 20  # what a process may grow by under attack: garbage is collected when it pleases
FLOOD_STREAMS, FLOOD_CONNECTIONS = 1000, 300
PROMPT_SECONDS = 5.0  # for an honest letter in a flood, on a machine that does other things as well


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm(tmp_path_factory):
    swarm = Swarm(tmp_path_factory.mktemp("door"))
    yield swarm
    swarm.sweep()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(swarm):
    engine = await swarm.engine("engine")
    yield engine
    await engine.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def rostered(swarm, engine):
    """Two peers of the test's own making, rostered by the engine."""
    peers = await asyncio.gather(*(swarm.outsider(f"peer-{time.monotonic_ns()}-{index}") for index in range(2)))
    await engine.set_roster({str(peer.peer_id): peer.addresses() for peer in peers})
    for peer in peers:
        peer.roster = {PeerID.from_base58(engine.peer): engine.addresses}
        await peer.reach(PeerID.from_base58(engine.peer))
    yield peers
    await asyncio.gather(*(peer.shutdown() for peer in peers))


@pytest_asyncio.fixture(loop_scope="module")
async def caller(rostered):
    return rostered[0]


@pytest_asyncio.fixture(loop_scope="module")
async def honest(rostered):
    return rostered[1]


def grown(engine):
    """How much memory the engine and its p2pd hold."""
    process = psutil.Process(engine.pid)
    return [each.memory_info().rss for each in (process, *process.children())]


async def stream_to(caller, engine, method="rpc_message"):
    name = BarnraisePeer._get_handle_name(RUN, method)
    _, reader, writer = await caller.call_binary_stream_handler(PeerID.from_base58(engine.peer), name)
    return reader, writer


async def send(peer, to):
    """Whether a letter was taken."""
    stub = BarnraisePeer.get_stub(peer, PeerID.from_base58(str(to)), namespace=RUN)
    return [ack async for ack in await stub.rpc_message(as_aiter(LETTER))] != []


async def is_taken(peer, engine):
    """How long a letter takes."""
    began = time.monotonic()
    async with asyncio.timeout(2 * PROMPT_SECONDS):
        assert await send(peer, engine.peer)
    return time.monotonic() - began


async def test_a_header_that_promises_a_tebibyte_ends_the_stream_and_takes_no_memory(engine, caller):
    before = grown(engine)
    for method in ("rpc_message", "rpc_part", "rpc_aggregate_part"):
        reader, writer = await stream_to(caller, engine, method)
        writer.write(P2P.MESSAGE_MARKER + (1 << 40).to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER))
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(20):
                for _ in range(200):
                    writer.write(bytes(1 << 20))
                    await writer.drain()
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
    assert all(now - then < FLAT_BYTES for then, now in zip(before, grown(engine), strict=True))


async def test_a_member_has_so_many_calls_at_once_and_others_are_answered_meanwhile(engine, caller, honest):
    held = [await stream_to(caller, engine) for _ in range(CALLS_PER_PEER_MAX)]
    await asyncio.sleep(0.5)  # until they are all admitted
    assert not await send(caller, engine.peer)
    await is_taken(honest, engine)
    for _, writer in held:
        writer.close()
    async with asyncio.timeout(10):
        while not await send(caller, engine.peer):
            await asyncio.sleep(0.1)


async def test_nobody_is_asked_for_its_state_nor_to_join_a_group_as_hivemind_would(engine, caller):
    for method in ("rpc_download_state", "rpc_join_group", "rpc_aggregate_part"):
        for namespace in (RUN, None):
            name = DecentralizedAverager._get_handle_name(namespace, method)
            with pytest.raises(P2PDaemonError, match="not supported"):
                await caller.call_binary_stream_handler(PeerID.from_base58(engine.peer), name)
    offered = {name for name in vars(BarnraisePeer) if name.startswith("rpc_")}
    assert offered == {"rpc_message", "rpc_part", "rpc_aggregate_part"}
    for method in (*offered, "rpc_download_state"):
        with contextlib.nullcontext() if method in offered else pytest.raises(P2PDaemonError, match="not supported"):
            _, writer = await stream_to(caller, engine, method)
            writer.close()


async def test_a_flood_of_streams_and_connections_by_strangers_costs_nobody_an_answer(swarm, engine, honest, caller):
    stranger = await swarm.outsider("stranger")
    host, port = engine.addresses[0].split("/")[2::2]
    before, waits, sockets = grown(engine), [], []
    try:
        stranger.roster = caller.roster
        await stranger.reach(PeerID.from_base58(engine.peer))

        async def knock():
            for _ in range(FLOOD_STREAMS // 20):
                with contextlib.suppress(Exception):
                    _, writer = await stream_to(stranger, engine, "rpc_part")
                    writer.write(bytes(1 << 16))
                    writer.close()

        flood = asyncio.gather(*(knock() for _ in range(20)))
        silent = await asyncio.gather(*(asyncio.open_connection(host, port) for _ in range(FLOOD_CONNECTIONS)))
        sockets.extend(writer for _, writer in silent)
        while not flood.done():
            waits.append(await is_taken(honest, engine))
            await asyncio.sleep(0.1)
        await flood
        waits.append(await is_taken(honest, engine))
    finally:
        for writer in sockets:
            writer.close()
        await stranger.shutdown()
    assert max(waits) < PROMPT_SECONDS
    assert all(now - then < FLAT_BYTES for then, now in zip(before, grown(engine), strict=True))


async def test_streams_of_strangers_that_wait_to_be_looked_at_push_out_no_letter(swarm, engine, honest, caller):
    """An engine that is busy for a second; hivemind would keep a hundred of these."""
    stranger = await swarm.outsider("stranger")
    stranger.roster = caller.roster
    await stranger.reach(PeerID.from_base58(engine.peer))

    async def knock():
        for _ in range(15):
            _, writer = await stream_to(stranger, engine, "rpc_part")
            writer.close()

    frozen = psutil.Process(engine.pid)
    try:
        frozen.suspend()
        await asyncio.gather(*(knock() for _ in range(20)))
        asking = [asyncio.create_task(send(honest, engine.peer)) for _ in range(5)]
        await asyncio.sleep(0.5)  # so that they stand behind the streams
        assert not any(each.done() for each in asking)
        frozen.resume()
        assert all(await asyncio.gather(*asking))
    finally:
        frozen.resume()
        await stranger.shutdown()


async def open_to(engine):
    host, port = engine.addresses[0].split("/")[2::2]
    return await Stranger.connect(host, int(port))


async def test_p2pd_is_started_with_limits_of_its_memory_and_files_and_a_round_is_far_from_them(engine, honest):
    await is_taken(honest, engine)
    (daemon,) = psutil.Process(engine.pid).children()
    assert set(daemon.rlimit(psutil.RLIMIT_DATA)) == {p2pd.DATA_BYTES_MAX}
    assert set(daemon.rlimit(psutil.RLIMIT_NOFILE)) == {p2pd.FILES_MAX}
    assert data_of(daemon) < p2pd.DATA_BYTES_MAX / 4


def data_of(process):
    """What counts against the limit: of what a Go program only reserves, nothing."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmData:")[2].split()[0]) << 10


LITTLE_BYTES = 24 << 20  # 6,000 streams


async def test_a_p2pd_that_is_flooded_past_its_memory_ends_and_another_takes_its_place(swarm, honest):
    """With less room than it has outside of tests: the flood takes seconds then."""
    engine = await swarm.engine("flooded")
    (daemon,) = psutil.Process(engine.pid).children()
    room = data_of(daemon) + LITTLE_BYTES
    daemon.rlimit(psutil.RLIMIT_DATA, (room, room))
    most, stranger = 0, await open_to(engine)
    try:
        async with asyncio.timeout(60):
            while not engine.closed.done():
                with contextlib.suppress(ConnectionError):
                    await stranger.open_streams(100)
                with contextlib.suppress(psutil.Error):
                    most = max(most, daemon.memory_info().rss)
                await asyncio.sleep(0)
    finally:
        stranger.close()
    assert most <= room
    again = await swarm.engine("flooded")
    try:
        assert again.peer == engine.peer
        await again.set_roster({str(honest.peer_id): honest.addresses()})
        honest.roster = {PeerID.from_base58(again.peer): again.addresses}
        await honest.reach(PeerID.from_base58(again.peer))
        await is_taken(honest, again)
    finally:
        await again.stop()


async def test_connections_past_the_limit_of_files_wait_until_others_have_gone(engine, honest):
    (daemon,) = psutil.Process(engine.pid).children()
    room = daemon.num_fds() + 20
    daemon.rlimit(psutil.RLIMIT_NOFILE, (room, p2pd.FILES_MAX))
    host, port = engine.addresses[0].split("/")[2::2]
    silent = await asyncio.gather(*(asyncio.open_connection(host, port) for _ in range(40)))
    try:
        async with asyncio.timeout(10):
            while daemon.num_fds() < room:
                await asyncio.sleep(0.05)
    finally:
        for _, writer in silent:
            writer.close()
    async with asyncio.timeout(20):
        while not await heard(honest, engine):
            await asyncio.sleep(0.1)
    assert not engine.closed.done() and daemon.num_fds() <= room
    daemon.rlimit(psutil.RLIMIT_NOFILE, (p2pd.FILES_MAX, p2pd.FILES_MAX))


async def heard(peer, engine):
    """As send, by an engine that may be out of files."""
    with contextlib.suppress(P2PDaemonError):
        return await send(peer, engine.peer)
    return False


async def test_p2pd_is_started_as_nobodys_relay_and_opens_no_port_of_the_router(engine):
    (daemon,) = psutil.Process(engine.pid).children()
    options = dict(word[1:].split("=", 1) for word in daemon.cmdline() if word.startswith("-") and "=" in word)
    off = ("relay", "autoRelay", "autonat", "natPortMap")
    assert {name: options[name] for name in off} == dict.fromkeys(off, "0")
    assert not [word for word in options if word.startswith("dht")]


async def test_nobody_gets_a_place_on_us_as_a_relay(swarm, engine):
    folder = swarm.folder / "relay"
    folder.mkdir()
    relay = await P2P.create(dht_mode="client", auto_nat=False, nat_port_map=False, host_maddrs=[LOCAL])
    seeker = await swarm.outsider("seeker")
    try:
        places = {relay.peer_id: await relay.get_visible_maddrs(), PeerID.from_base58(engine.peer): engine.addresses}
        for peer, addresses in places.items():
            await seeker._client.connect(peer, [Multiaddr(str(address).partition("/p2p/")[0]) for address in addresses])
        assert RESERVED in await reservation(seeker, relay.peer_id), "hivemind's default is to be one"
        assert await reservation(seeker, PeerID.from_base58(engine.peer)) == b""
    finally:
        await asyncio.gather(relay.shutdown(), seeker.shutdown())


HOP = "/libp2p/circuit/relay/0.2.0/hop"  # the protocol in which a place is asked for
RESERVE, RESERVED = b"\x02\x08\x00", b"\x28\x64"  # HopMessage: type RESERVE; status OK


async def reservation(seeker, peer):
    """What a peer answers to somebody who wants to be called by way of it."""
    answer = b""
    with contextlib.suppress(P2PDaemonError, ConnectionError):  # the protocol is not spoken there
        _, reader, writer = await seeker.call_binary_stream_handler(peer, HOP)
        writer.write(RESERVE)
        async with asyncio.timeout(10):
            while RESERVED not in answer and (more := await reader.read(1000)):
                answer += more
    return answer


async def test_the_sockets_of_p2pd_are_closed_to_other_users(swarm, engine, tmp_path):
    folder = swarm.folder / "engine" / "run"
    assert list(folder.glob("p2p*.sock"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (opened := tmp_path / "run").mkdir(mode=0o755)
    for runtime in (opened, tmp_path / ("long-" * 20)):
        assert stat.S_IMODE(p2pd.socket_folder(runtime).stat().st_mode) == 0o700
        p2pd.sweep(runtime)


async def test_what_a_node_announces_takes_the_place_of_where_it_listens(swarm):
    announced = "/ip4/203.0.113.7/tcp/49400"
    peer = await swarm.outsider("announcing", announce=[announced])
    try:
        assert peer.addresses() == (announced,)
        await peer.look_around()
        assert peer.addresses() == (announced,)
    finally:
        await peer.shutdown()


# families


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
async def test_a_node_is_called_over_ipv6_and_over_ipv4_wherever_nobody_said_where_it_listens(swarm, tmp_path):
    both = await swarm.outsider("both", listen=Settings(tmp_path).listen_multiaddrs)
    callers = [await swarm.outsider(name, listen=[where]) for name, where in (("4", LOCAL), ("6", "/ip6/::1/tcp/0"))]
    try:
        for caller, family in zip(callers, ("/ip4/127.0.0.1/", "/ip6/::1/"), strict=True):
            caller.roster = {both.peer_id: [at for at in both.addresses() if at.startswith(family)]}
            both.roster = {caller.peer_id: caller.addresses()}
            await caller.reach(both.peer_id)
            await caller._client.disconnect(both.peer_id)
            await both.reach(caller.peer_id)
    finally:
        await asyncio.gather(*(peer.shutdown() for peer in (both, *callers)))


async def test_a_machine_without_ipv6_listens_where_it_can(monkeypatch):
    monkeypatch.setattr("protocol.p2pd.socket.has_dualstack_ipv6", lambda: False)
    monkeypatch.setattr("protocol.p2pd.socket.AF_INET6", -1)  # as of a kernel without it
    p2pd.check_free(("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/49400"))


# those whom nobody can call


async def test_a_client_is_called_over_the_line_that_it_keeps_open_itself(swarm, engine):
    """And after the peer was gone for a while, over the next one."""
    client = await swarm.engine("client", listen=())
    peer = await swarm.outsider("comes-and-goes")
    where = peer.addresses()
    try:
        with pytest.raises(Refused, match="takes no calls"):
            await peer.reach(PeerID.from_base58(client.peer))
        for _ in range(2):
            peer.roster = {PeerID.from_base58(client.peer): ()}
            await client.set_roster({str(peer.peer_id): where}, calls_only=True)  # as at every tick of LINES_SECONDS
            async with asyncio.timeout(10):
                while not await calls_back(peer, client):
                    await asyncio.sleep(0.1)
            await peer.shutdown()
            peer = await swarm.outsider("comes-and-goes", listen=where)
    finally:
        await asyncio.gather(client.stop(), peer.shutdown())
    assert len(swarm.heard["client"]) == 2


async def calls_back(peer, client):
    with contextlib.suppress(Refused):
        await peer.reach(PeerID.from_base58(client.peer))
        return await send(peer, client.peer)


async def test_whether_a_peer_can_be_called_is_found_out_by_a_stranger_to_it(swarm, meeting, engine, honest):
    """The rendezvous itself has a connection to the client, and would find it wherever it is."""
    sockets = swarm.folder / "rendezvous" / "run"
    before = set(sockets.glob("*.sock"))
    client = await swarm.outsider("behind-a-router", listen=[])
    try:
        assert await client.reached(meeting.addresses[0])
        (there,), (elsewhere,) = engine.addresses, honest.addresses()
        answers = await asyncio.gather(
            meeting.call(engine.peer, ("/ip4/127.0.0.1/tcp/1", there)),
            meeting.call(engine.peer, (elsewhere,)),
            meeting.call(str(client.peer_id), ("/ip4/127.0.0.1/tcp/1",)),
        )
        assert answers == [there, "", ""]
        assert await meeting.call(engine.peer, ("/ip4/127.0.0.1/tcp/1",)) == "", "nobody remembers where it was"
    finally:
        await client.shutdown()
    assert set(sockets.glob("*.sock")) == before, "nothing of the strangers is left"


# the directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def meeting(swarm):
    home = swarm.folder / "rendezvous"
    home.mkdir()
    (home / "identity").write_bytes(libp2p_private_key_bytes(Key.generate()))
    meeting = await Rendezvous.start(runtime_dir=home / "run", identity_path=home / "identity", run=RUN, listen=[LOCAL])
    yield meeting
    await meeting.stop()


@contextlib.asynccontextmanager
async def writer_to(swarm, meeting, name, *, rostered=()):
    """Somebody who stores what they like in the directory: what it takes in, by key."""
    peer = await swarm.outsider(name)
    try:
        await meeting.set_roster([str(peer.peer_id), *rostered])
        at, _, ident = meeting.addresses[0].rpartition("/p2p/")
        ident = PeerID.from_base58(ident)
        await peer._client.connect(ident, [Multiaddr(at)])
        protocol = await DHTProtocol.create(peer, DHTID.generate(), 20, 5, 3, 5.0, client_mode=True)

        async def store(key, value, *, seconds=60.0):
            taken = await protocol.call_store(ident, [DHTID.generate(key)], [value], [time.time() + seconds])
            return bool(taken and taken[0])

        yield peer, store
    finally:
        await peer.shutdown()


async def test_a_peer_writes_its_own_record_only_short_and_for_an_hour(swarm, meeting):
    async with writer_to(swarm, meeting, "writer") as (peer, store):
        own, fine = f"{RUN}/{peer.peer_id}", b'["/ip4/127.0.0.1/tcp/1"]'
        assert await store(own, fine)
        for key in (
            f"{RUN}/12D3KooWDC1Kfp31q8noa7BTRA8oKCXm3ZKYQYfZGKFgL7rpwGSg",
            f"{RUN}",
            "x",
            f"other/{peer.peer_id}",
        ):
            assert not await store(key, fine), key
        assert not await store(own, bytes(2049))
        assert not await store(own, fine, seconds=RECORD_SECONDS_MAX + 60)
        assert not await store(own, fine, seconds=3e10)


async def test_who_is_not_rostered_writes_nothing(swarm, meeting):
    async with writer_to(swarm, meeting, "unrostered") as (peer, store):
        await meeting.set_roster([])
        assert not await store(f"{RUN}/{peer.peer_id}", b'["/ip4/127.0.0.1/tcp/1"]')


NESTED = b"[" * 1500 + b"]" * 1500
RECORDS = [
    NESTED[:2000],
    b"[" * 1000 + b"]" * 1000,
    b"\x91" * 1500 + b"\xc0",  # msgpack, as hivemind would read it
    b"\xdd\x7f\xff\xff\xff",  # an array of 2^31 - 1
    b"\xc7\x01\x05x",  # an extension that nobody knows
    b"\xd4\x40\x90",  # a tuple
    b"",
    b"7",
    b"null",
    b'{"/ip4/127.0.0.1/tcp/1": 1}',
    b'"/ip4/127.0.0.1/tcp/1"',
    b"[" + b'"/ip4/127.0.0.1/tcp/1",' * ADDRESSES_MAX + b'"/ip4/127.0.0.1/tcp/1"]',
    b'["/ip4/' + b"1" * ADDRESS_CHARACTERS_MAX + b'/tcp/1"]',
    b'[1.0, null, true, "/unix/run/x.sock", "/ip4/127.0.0.1/udp/1/quic", "/ip4/1/tcp/1\\n", "file:///etc/passwd"]',
    b'["/ip4/1.2.3.4/tcp/1/p2p/12D3KooWDC1Kfp31q8noa7BTRA8oKCXm3ZKYQYfZGKFgL7rpwGSg/p2p-circuit"]',
    b'["' + b"a" * 5000 + b'"]',
]


@pytest.mark.parametrize("record", [*RECORDS, None, ["/ip4/127.0.0.1/tcp/1"]])
async def test_a_record_is_addresses_or_nothing(record):
    assert _addresses(record) == ()


async def test_no_record_of_a_peer_keeps_a_node_from_an_answer(swarm, meeting):
    async with writer_to(swarm, meeting, "liar") as (liar, store):
        victim = await swarm.outsider("victim")
        try:
            await meeting.set_roster([str(liar.peer_id), str(victim.peer_id)])
            victim.roster = {liar.peer_id: ("/ip4/127.0.0.1/tcp/1",)}
            victim.look_up = Directory(victim, run=RUN, rendezvous=meeting.addresses).look_up
            own = f"{RUN}/{liar.peer_id}"
            for until, record in enumerate(RECORDS):
                assert await store(own, record, seconds=60.0 + until) == (len(record) <= RECORD_BYTES_MAX)
                with pytest.raises(Refused, match="answers at none"):
                    await victim.reach(liar.peer_id)
            assert await store(own, json.dumps(liar.addresses()).encode(), seconds=90.0)
            await victim.reach(liar.peer_id)
        finally:
            await victim.shutdown()


@contextlib.asynccontextmanager
async def lying_rendezvous():
    """hivemind's own DHT node, that takes in and says whatever it is told to."""
    p2p = await P2P.create(host_maddrs=[LOCAL], dht_mode="client", **p2pd.OPTIONS)
    try:
        node, times = await DHTNode.create(p2p), itertools.count(60)

        def says(peer, record, subkey=None):
            key = DHTID.generate(f"{RUN}/{peer}")
            node.protocol.storage.data.pop(key, None)
            assert node.protocol.storage.store(key, record, time.time() + next(times), subkey)

        yield [str(address) for address in await p2p.get_visible_maddrs()], says
        await node.shutdown()
    finally:
        await p2p.shutdown()


async def test_a_rendezvous_that_lies_leads_nobody_to_another_and_keeps_nobody_from_the_truth(swarm, engine, honest):
    victim = await swarm.outsider("misled")
    try:
        async with lying_rendezvous() as (addresses, says):
            wanted = PeerID.from_base58(engine.peer)
            victim.roster = {wanted: ("/ip4/127.0.0.1/tcp/1",)}
            victim.look_up = Directory(victim, run=RUN, rendezvous=addresses).look_up
            other, large = (
                json.dumps(honest.addresses()).encode(),
                json.dumps(["/ip4/127.0.0.1/tcp/1"] * 60000).encode(),
            )
            for record, subkey in ((other, None), (RECORDS[0], None), (other, "forged"), (large, None)):
                says(engine.peer, record, subkey)
                with pytest.raises(Refused, match="answers at none"):
                    await victim.reach(wanted)
            assert wanted not in {info.peer_id for info in await victim.list_peers()}
            says(engine.peer, json.dumps([*honest.addresses(), *engine.addresses]).encode())
            await victim.reach(wanted)
    finally:
        await victim.shutdown()


async def test_addresses_in_a_record_are_read():
    assert _addresses(b'["/ip4/1.2.3.4/tcp/5", 7, "/dns4/example.org/tcp/6"]') == (
        "/ip4/1.2.3.4/tcp/5",
        "/dns4/example.org/tcp/6",
    )
