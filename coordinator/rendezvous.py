"""The rendezvous: the hivemind DHT's bootstrap peer, in a child process, and the coordinator's handle on it.

It keeps where each rostered peer last was, for an hour at most, and answers nobody else; and it tries whether nodes can
be called. hivemind is imported only in the child.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Final

from protocol import p2pd
from protocol.errors import Code, Refused
from protocol.process import Channel, ChannelClosed, Child, Frame, parent_channel
from protocol.types import PeerId, RunId

START_SECONDS: Final = 60.0  # importing torch on a slow disk, and p2pd's own 15 seconds
STOP_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 10.0
CALL_SECONDS: Final = 10.0  # a TCP and TLS handshake across the world, twice over
CALLS_AT_ONCE: Final = 2  # each is a p2pd of its own for as long as it takes
CALL_WAITS_SECONDS: Final = 120.0  # behind those of a swarm that has just started
MESSAGE_BYTES_MAX: Final = 1 << 16  # a DHT message carries one record, and the few other bootstrap peers
RECORD_BYTES_MAX: Final = 2048  # eight addresses, as node.swarm reads them
RECORD_SECONDS_MAX: Final = 3600.0
ENVIRONMENT: Final = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "HIVEMIND_LOGLEVEL": "ERROR"}


class Rendezvous:
    """A running rendezvous. Whoever starts it must `stop` it; `closed` tells when it ended by itself."""

    def __init__(self, child: Child, runtime_dir: Path) -> None:
        self.peer = PeerId("")
        self.addresses: tuple[str, ...] = ()  # multiaddrs with /p2p
        self.closed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._child = child
        self._runtime_dir = runtime_dir
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Frame]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls, *, runtime_dir: Path, identity_path: Path, run: RunId, listen: Sequence[str], log: Any = None
    ) -> Rendezvous:
        """Start the process and its p2pd. `listen` is multiaddrs; the identity file is libp2p_private_key_bytes."""
        rendezvous = cls(await Child.start("coordinator.rendezvous", env=ENVIRONMENT, log=log), runtime_dir)
        settings = {
            "runtime_dir": str(runtime_dir),
            "identity_path": str(identity_path),
            "run": run,
            "listen": list(listen),
        }
        try:
            started = await rendezvous._ask("start", settings, seconds=START_SECONDS)
        except BaseException:
            await rendezvous.stop()
            raise
        rendezvous.peer = PeerId(started.body["peer"])
        rendezvous.addresses = tuple(started.body["addresses"])
        return rendezvous

    @property
    def pid(self) -> int:
        return self._child.pid

    async def set_roster(self, peers: Iterable[PeerId]) -> None:
        """Who is answered at all. Replaces the roster before."""
        await self._ask("roster", {"peers": list(peers)}, seconds=ANSWER_SECONDS)

    async def call(self, peer: PeerId, addresses: Sequence[str]) -> str:
        """The one of these multiaddrs at which the peer answers somebody whom it has never met; "" if at none."""
        answer = await self._ask("call", {"peer": peer, "addresses": list(addresses)}, seconds=CALL_WAITS_SECONDS)
        return str(answer.body["answered"])

    async def stop(self) -> None:
        await self._child.stop(grace_seconds=STOP_SECONDS)
        await self._reading
        p2pd.sweep(self._runtime_dir)

    async def _ask(self, order: str, body: Mapping[str, Any], *, seconds: float) -> Frame:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(seconds):
                await self._child.channel.send({"order": order, "number": number, **body})
                frame: Frame = await answer
        except (ChannelClosed, TimeoutError) as error:
            raise Refused(Code.CHILD_DIED, f"the rendezvous does not answer: {error}") from error
        finally:
            self._answers.pop(number, None)
        if "refused" in frame.body:
            raise Refused.from_wire(frame.body["refused"], frame.body["what"])
        return frame

    async def _read(self) -> None:
        with suppress(ChannelClosed):
            while True:
                frame = await self._child.channel.receive()
                number = frame.body.get("number")
                if isinstance(number, int) and (answer := self._answers.get(number)) and not answer.done():
                    answer.set_result(frame)
        code = await self._child.wait()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ChannelClosed("the rendezvous has ended"))
        self.closed.set_result(code)


async def serve(channel: Channel) -> None:
    """The child: start the DHT node, then follow the roster until the coordinator closes the channel or ends."""
    from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
    from hivemind.dht.node import DHTNode
    from hivemind.dht.routing import DHTID
    from hivemind.p2p import P2P, P2PContext, P2PDaemonError, PeerID
    from hivemind.utils.multiaddr import Multiaddr

    settings = (await channel.receive()).body
    roster: set[PeerID] = set()
    caller: ContextVar[PeerID] = ContextVar("caller")
    turn = asyncio.Semaphore(CALLS_AT_ONCE)
    calls: set[asyncio.Task[None]] = set()

    class GuardedP2P(P2P):  # type: ignore[misc]
        """Answers rostered peers only. The DHT's requests are all unary."""

        DHT_MODE_MAPPING: ClassVar[dict[str, dict[str, int]]] = {"none": {}}  # no libp2p DHT in p2pd
        _UNIX_SOCKET_PREFIX = f"/unix{p2pd.socket_folder(Path(settings['runtime_dir']))}/"

        @staticmethod
        def _make_process_args(*args: Any, **options: Any) -> list[str]:
            return p2pd.tied(P2P._make_process_args(*args, **options))

        async def _add_protobuf_unary_handler(
            self, handle_name: str, handler: Callable[[Any, Any], Awaitable[Any]], kind: Any, balanced: bool = False
        ) -> None:
            async def answer(request: bytes, remote: PeerID) -> bytes:
                if remote not in roster:
                    raise PermissionError
                caller.set(remote)
                context = P2PContext(handle_name=handle_name, local_id=self.peer_id, remote_id=remote)
                return (await handler(kind.FromString(request), context)).SerializeToString()  # type: ignore[no-any-return]

            await self._client.add_unary_handler(handle_name, answer, balanced=balanced)

    class AddressesOnly(RecordValidatorBase):  # type: ignore[misc]
        """One short record for each rostered peer, written by that peer: nothing grows, and nobody moves another."""

        def validate(self, record: DHTRecord) -> bool:
            own = DHTID.generate(f"{settings['run']}/{caller.get()}").to_bytes()  # the key that node.swarm uses
            lasts = record.expiration_time <= time.time() + RECORD_SECONDS_MAX
            return bool(record.key == own and lasts and len(record.subkey) + len(record.value) <= RECORD_BYTES_MAX)

    async def call(order: Mapping[str, Any]) -> None:
        """With a p2pd that knows nobody: one that the peer has connected to would not call it, nor one that has before."""
        answer, peer = {"number": order["number"], "answered": ""}, PeerID.from_base58(order["peer"])
        async with turn:
            try:
                stranger = await GuardedP2P.create(host_maddrs=None, no_listen=True, dht_mode="none", **p2pd.OPTIONS)
            except P2PDaemonError as error:
                await channel.send(answer | {"refused": Code.CHILD_DIED.code, "what": f"p2pd: {error}"})
                return
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    await stranger._client.connect(peer, [Multiaddr(address) for address in order["addresses"]])
                    found = await stranger.list_peers()
                answer["answered"] = next((str(at) for info in found if info.peer_id == peer for at in info.addrs), "")
            except (P2PDaemonError, TimeoutError, ValueError):
                pass  # it cannot be called
            finally:
                await stranger.shutdown()
        await channel.send(answer)

    os.environ.update(p2pd.ENVIRONMENT)
    try:
        p2pd.check_free(settings["listen"])
        transport = await GuardedP2P.create(
            host_maddrs=settings["listen"],
            identity_path=settings["identity_path"],
            dht_mode="none",
            persistent_conn_max_msg_size=MESSAGE_BYTES_MAX,
            **p2pd.OPTIONS,
        )
    except (Refused, P2PDaemonError) as error:
        refused = error if isinstance(error, Refused) else Refused(Code.CHILD_DIED, f"p2pd: {error}")
        await channel.send({"number": settings["number"], "refused": refused.reason.code, "what": refused.what})
        return
    watching = asyncio.create_task(_end_with(transport._child))
    try:
        node = await DHTNode.create(transport, record_validator=AddressesOnly(), cache_size=1, cache_locally=False)
        addresses = [str(address) for address in await transport.get_visible_maddrs()]
        await channel.send({"number": settings["number"], "peer": str(transport.peer_id), "addresses": addresses})
        while node.is_alive:
            order = (await channel.receive()).body
            if order["order"] == "call":
                calls.add(task := asyncio.create_task(call(order)))
                task.add_done_callback(calls.discard)
                continue
            roster.clear()
            roster.update(PeerID.from_base58(peer) for peer in order["peers"])
            await channel.send({"number": order["number"]})
    except ChannelClosed:
        pass
    finally:
        watching.cancel()
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await transport.shutdown()


async def _end_with(process: asyncio.subprocess.Process) -> None:
    """Without its p2pd it is of no use: end, and let the coordinator start another."""
    await process.wait()
    os._exit(1)


async def main() -> None:
    channel = await parent_channel()
    import torch

    torch.set_num_threads(1)
    await serve(channel)


if __name__ == "__main__":
    asyncio.run(main())
