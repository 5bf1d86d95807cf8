"""What a node reads back from its own disk."""

from __future__ import annotations

import hashlib
import shutil
import struct

import numpy as np
from hypothesis import strategies as st
from structlog.testing import capture_logs

from node import config, journal, link
from node.progress import MAGIC, ProgressFile
from node.standing import Standing
from protocol import canonical, log, state
from protocol.types import DataRange, Digest
from tests import strategies
from tests.fuzz.target import PARAMETERS, named, scratch, split, target
from tests.strategies import CANONICAL, KEY, PEER, RUN

_DOOR = link.Door(("127.0.0.1:1",), "0" * 64, RUN)


@target(st.just(b'{"version": 1, "invite": "barnraise:aa"}\n'))
def membership(data: bytes) -> None:
    home = config.Home(scratch())
    home.membership.write_bytes(data)
    home.remembered()


def _base_file() -> bytes:
    path = scratch() / "seed"
    spans = (DataRange(0, Digest("5" * 64), 0, 4), DataRange(1, Digest("a" * 64), 8, 16))
    whole = state.State(3, np.ones(PARAMETERS, np.float32), np.zeros(PARAMETERS, np.float32))
    whole.consumed = whole.consumed.with_ranges(spans)
    state.write_base(path, whole)
    found = path.read_bytes()
    return b"header\n" + found[8 : 8 + struct.unpack("<Q", found[:8])[0]]


@target(st.builds(_base_file))
def checkpoint(data: bytes) -> None:
    """A base checkpoint: after `header`, its JSON with tensors of the right size behind it; else the whole file."""
    how, body = split(data)
    if how == "header":
        body = struct.pack("<Q", len(body)) + body + bytes(8 * PARAMETERS)
    path = scratch() / "base"
    path.write_bytes(body)
    found = state.read_base(path, parameters=PARAMETERS, momentum=True, digest=Digest("0" * 64))
    raise AssertionError(f"a state of another digest was taken: {found.round}")


@target(strategies.of(CANONICAL["Progress"]).map(lambda each: b"header\n" + canonical.to_bytes(each)))
def saved_progress(data: bytes) -> None:
    """The file of local progress: after `header`, its header with right values and a right sum; else the whole file."""
    how, body = split(data)
    if how == "header":
        body = MAGIC + struct.pack("<Q", len(body)) + body + bytes(4 * PARAMETERS)
        body += hashlib.sha256(body).digest()
    path = scratch() / "progress"
    path.write_bytes(body)
    with capture_logs():  # where a refusal goes: without the file the node starts all the same
        found = ProgressFile(path, PARAMETERS, room=lambda size: True, now=0.0).load()
    assert found is None or found[1].size == PARAMETERS


@target(strategies.of(Standing).map(lambda each: b"sum\n" + canonical.to_bytes(each)))
def standing(data: bytes) -> None:
    """What a node keeps for a start without its coordinator."""
    how, body = split(data)
    path = scratch() / "standing"
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body if how == "sum" else body)
    with capture_logs():
        Standing.load(path, _DOOR, node=KEY.public, peer=PEER)


_JOURNAL = {
    "promise.json": "Promise",
    "base.json": "BaseCheckpoint",
    "log/00000003.json": "LogEntry",
    "rosters/00000001.json": "SignedRoster",
    "rollbacks/0001.json": "SignedRollback",
}


@target(
    st.sampled_from(sorted(_JOURNAL)).flatmap(
        lambda name: strategies.of(CANONICAL[_JOURNAL[name]]).map(lambda each: named(name, each))
    )
    | st.just(b'silence.json\n{"epoch":1}')
    | st.just(b"rosters.txt\n1 " + b"5" * 64 + b"\n")
)
def diary(data: bytes) -> None:
    """A node's journal with one file of it changed."""
    name, body = split(data)
    if name not in (*_JOURNAL, "silence.json", "seal.json", "rosters.txt"):
        return
    folder = scratch() / "journal"
    shutil.rmtree(folder, ignore_errors=True)
    journal.Journal(folder)
    (folder / name).write_bytes(body)
    found = journal.Journal(folder)
    found.rosters(), found.roster_digest(1), found.rollbacks(), found.base(), found.silence(), found.sealed()
    found.entries(3, most=2)
    found.promise(log.next_head(found.entry(3).record) if found.entry(3) else log.Head(0, Digest("0" * 64)))
