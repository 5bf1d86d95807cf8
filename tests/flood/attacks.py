"""The floods, by name. Each is bounded in count and in time, and tells what it did as one line of JSON."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import ssl
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random

import grpc
import structlog

import node.link
from node.core.backoff import wait_seconds
from node.link import Beat, Door, Link
from protocol import tls
from protocol.errors import Refused
from protocol.identity import Key
from protocol.limits import PROTOCOL_VERSION
from protocol.v1 import barnraise_pb2 as wire

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty settings
AT_ONCE = 64

done: Counter[str] = Counter()


def channel(told):
    root = grpc.ssl_channel_credentials(Path(told["certificate"]).read_bytes())
    options = [
        ("grpc.ssl_target_name_override", tls.SERVER_NAME),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 100),
        ("grpc.max_send_message_length", -1),
    ]
    return grpc.aio.secure_channel(f"127.0.0.1:{told['door']}", root, options)


async def call(method, request, **more):
    done["attempted"] += 1
    try:
        reply = await method(request, timeout=5, **more)
        done["answered"] += 1
        return reply
    except grpc.aio.AioRpcError as error:
        done[error.code().name.lower()] += 1
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            await asyncio.sleep(0.01)


async def in_parallel(work, *, at_once=AT_ONCE):
    async with asyncio.TaskGroup() as group:
        for number in range(at_once):
            group.create_task(work(number))


async def joins_of_one(told, until, count):
    """Challenges asked and answered wrongly, over channels that are opened again whenever they are closed."""
    async with channel(told) as one:
        ask = one.unary_unary(
            "/barnraise.v1.Coordinator/Challenge", response_deserializer=wire.ChallengeReply.FromString
        )
        answer = one.unary_unary("/barnraise.v1.Coordinator/Open")

        async def join(_):
            while done["joins"] < count and time.monotonic() < until:
                done["joins"] += 1
                node = Key.generate().public
                asked = wire.ChallengeRequest(node=node, protocol=PROTOCOL_VERSION)
                challenge = await call(ask, asked.SerializeToString())
                nonce = challenge.nonce if challenge is not None else bytes(32)
                forged = wire.OpenRequest(node=node, nonce=nonce, signature=bytes(64), protocol=PROTOCOL_VERSION)
                await call(answer, forged.SerializeToString())

        await in_parallel(join)


async def joins_of_many(told, until, count):
    """A TLS handshake each, from 2,500 addresses of 250 networks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])

    async def join(worker):
        while done["joins"] < count and time.monotonic() < until:
            number = done["joins"]
            done["joins"] += 1
            source = f"127.{1 + number % 250}.7.{1 + number // 250 % 10}"
            try:
                async with asyncio.timeout(5):
                    _, writer = await asyncio.open_connection(
                        "127.0.0.1", told["door"], ssl=context, local_addr=(source, 0)
                    )
                    writer.write(PREFACE)
                    await writer.drain()
                    done["let in"] += 1
                    writer.close()
            except (OSError, TimeoutError):
                done["hung up on"] += 1

    await in_parallel(join)


async def calls_of_strangers(told, until, count):
    async with channel(told) as one:
        beat = one.unary_unary("/barnraise.v1.Coordinator/Heartbeat")
        request = wire.HeartbeatRequest(activity="training").SerializeToString()

        async def ask(_):
            while done["attempted"] < count and time.monotonic() < until:
                await call(beat, request)

        await in_parallel(ask)


async def calls_of_members(told, until, count):
    """As many members as there are invites, each as fast as it can; one that is hung up on comes back, and waits for nothing."""
    node.link.BUSY_TRIES = 1
    door = Door((f"127.0.0.1:{told['door']}",), told["fingerprint"], told["run"])
    links = [Link(door, key=Key.generate(), transport_key=Key.generate()) for _ in told["invites"]]

    async def member(number):
        link, invite = links[number], told["invites"][number]
        while done["attempted"] < count and time.monotonic() < until:
            with suppress(Refused):
                done["sessions"] += 1
                await link.open(life=1, invite=invite)
                metadata = link._metadata()

                async def ask(_, link=link, metadata=metadata):
                    request = wire.HeartbeatRequest(activity="training")
                    while done["attempted"] < count and time.monotonic() < until and link._stub is not None:
                        before = done["unavailable"] + done["unauthenticated"]
                        await call(link._stub.Heartbeat, request, metadata=metadata)
                        if done["unavailable"] + done["unauthenticated"] > before:
                            return

                await in_parallel(ask, at_once=max(4, AT_ONCE // len(links)))
        await link.close()

    await in_parallel(member, at_once=len(links))


async def _loris(port, first, each, until, count):
    """Connections that say one thing, and then a byte now and then."""
    held = []
    for number in itertools.count():
        if number >= count or time.monotonic() > until:
            break
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(first)
            held.append(writer)
            done["connected"] += 1
        except OSError:
            done["failed"] += 1
        if number % 50 == 0:
            await asyncio.sleep(0.01)
    while time.monotonic() < until:
        for writer in held:
            if not writer.is_closing():
                writer.write(each)
        await asyncio.sleep(0.5)
    done["still open"] = sum(not writer.is_closing() for writer in held)
    for writer in held:
        writer.transport.abort()


async def slow_door(told, until, count):
    await _loris(told["door"], b"\x16\x03\x01", b"\x02", until, count)


async def slow_page(told, until, count):
    await _loris(told["page"], b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X-A: b\r\n", until, count)


async def huge_messages(told, until, count):
    """Four of 256 MiB at a time, until there have been so many."""
    message = bytes(256 << 20)
    async with channel(told) as one:
        push = one.unary_unary("/barnraise.v1.Coordinator/PushEntry")

        async def send(_):
            while done["attempted"] < count and time.monotonic() < until:
                await call(push, message)

        await in_parallel(send, at_once=4)


async def event_readers(told, until, count):
    """As many as the system lets us hold; they take nothing."""
    held = []
    for number in range(count):
        if time.monotonic() > until:
            break
        reader = socket.create_connection(("127.0.0.1", told["page"]), timeout=5)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with suppress(OSError):
            reader.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        held.append(reader)
        done["connected"] += 1
        if number % 100 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(max(0.0, until - time.monotonic()))


async def herd(told, until, count):
    """Honest nodes after an outage, all at once: each waits as it is told, until its first heartbeat is answered."""
    door = Door((f"127.0.0.1:{told['door']}",), told["fingerprint"], told["run"])
    links = []  # they stay

    async def node(number):
        link = Link(door, key=Key.generate(), transport_key=Key.generate())
        failures, luck = 0, Random(number)
        while time.monotonic() < until:
            try:
                await link.open(life=1, invite=told["invites"][number])
                await link.heartbeat(Beat("syncing"))
            except Refused as refused:
                done[refused.reason.code] += 1
                failures += 1
                await asyncio.sleep(wait_seconds(failures=failures, luck=luck.random()))
            else:
                done["in"] += 1
                links.append(link)
                return

    await in_parallel(node, at_once=count)


ATTACKS = {
    each.__name__: each
    for each in (
        joins_of_one, joins_of_many, calls_of_strangers, calls_of_members, slow_door, slow_page, huge_messages,
        event_readers, herd,
    )
}  # fmt: skip


async def main() -> None:
    name, seconds, count = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    told = json.load(sys.stdin)
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # what is printed here is one line
    began = time.monotonic()
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds + 10):
            await ATTACKS[name](told, began + seconds, count)
    print(json.dumps({**done, "seconds": round(time.monotonic() - began, 2)}), flush=True)
    os._exit(0)  # thousands of sockets need no polite end


if __name__ == "__main__":
    asyncio.run(main())
