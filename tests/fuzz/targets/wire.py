"""Certificates, fields of messages, and frames between our own processes."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from contextlib import suppress
from dataclasses import replace

from google.protobuf.message import DecodeError
from hypothesis import strategies as st

from coordinator import service
from coordinator.core import names
from protocol import canonical, process, tls
from protocol.errors import Refused
from protocol.v1 import barnraise_pb2 as wire
from tests.fuzz.target import FOUND, split, target
from tests.strategies import KEY, RUN


def _certificate() -> bytes:
    """One that `RUN` endorses; it was found with another version in it."""
    found = (FOUND / "certificate" / "of-version-6").read_bytes()
    return found.replace(bytes.fromhex("a003020105"), bytes.fromhex("a003020102"), 1)


@target(st.builds(_certificate))
def certificate(data: bytes) -> None:
    """What a server shows before anybody knows who it is."""
    number = tls.endorsed(data, RUN)
    assert number >= 0
    with suppress(Refused):
        tls.fingerprint(data)


def _frame(body: object, payload: bytes = b"") -> bytes:
    header = json.dumps(body).encode()
    return struct.pack("<IQ", len(header), len(payload)) + header + payload


@target(st.sampled_from((_frame({"a": 1}), _frame({"do": "average"}, b"xyz"), _frame({}) * 2)))
def frames(data: bytes) -> None:
    """What a child says to its parent: frames, and then the end of the channel."""

    async def read() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.setblocking(False)
            theirs.sendall(data[: 64 << 10])
            theirs.shutdown(socket.SHUT_WR)
            channel = await process.Channel.over(ours)
            with suppress(process.ChannelClosed):
                while True:
                    assert isinstance((await channel.receive()).body, dict)
            channel.close()

    asyncio.run(read())


_MESSAGES = {
    "Heartbeat": wire.HeartbeatRequest(activity="training", lease_ids=["1f"], addresses=["/ip4/10.0.0.1/tcp/1"]),
    "Open": wire.OpenRequest(node=KEY.public, name="keen", addresses=["/ip4/10.0.0.1/tcp/1"], software="x"),
}


@target(
    st.sampled_from(sorted(_MESSAGES)).map(lambda name: name.encode() + b"\n" + _MESSAGES[name].SerializeToString())
)
def fields(data: bytes) -> None:
    """The fields of a protobuf message from a node, which are checked before anything is done with them."""
    name, body = split(data)
    if name not in _MESSAGES:
        return
    try:
        message = type(_MESSAGES[name]).FromString(body)
    except DecodeError:
        return
    if isinstance(message, wire.HeartbeatRequest):
        beat = service._beat(KEY.public, message, "10.0.0.1")
        json.dumps(replace(beat, node="").__dict__, allow_nan=False, default=str)  # it is shown on the page
    else:
        service._node(message.node)
        service._addresses(message.addresses)
        assert names.distinct_name(message.name, KEY.public, ()).isprintable()
        assert canonical.shown(message.software).isprintable()
