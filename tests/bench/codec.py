"""Codec bench: MB/s of float32 in and out, one thread, next to a memory copy; and fold in parameters/s."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from protocol.blobs import digest_of
from protocol.codec import NAMES, codec
from protocol.exchange import Packing
from protocol.fold import Outer, OuterKind, fold
from protocol.limits import CHUNK_VALUES
from protocol.state import initial_state
from protocol.types import Contribution, DataRange, Digest, Epoch, NodeId, Part, Record, RoundNumber, RunId
from tests.bench.table import Row, show

REPEATS = 5  # the best counts: the rest is other programs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=256 * CHUNK_VALUES)
    size = parser.parse_args().values
    values = (np.random.default_rng(0).standard_normal(size) * 1e-3).astype(np.float32)
    out = np.zeros_like(values)
    copied = _rate(lambda: np.copyto(out, values), values.nbytes)
    rows = [Row("memory copy", copied, "MB/s", digits=0)]
    for name in NAMES:
        chosen = codec(name)
        room = np.zeros(chosen.encoded_bytes(size), np.uint8)
        encode = _rate(partial(chosen.encode_into, values, room), values.nbytes)
        data = room.tobytes()
        decode = _rate(partial(chosen.decode_into, data, out), values.nbytes)
        check = _rate(partial(chosen.check, data, size), values.nbytes)
        error = float(np.sqrt(np.mean((out - values) ** 2)) / np.sqrt(np.mean(values**2)))
        rows += [_row(f"{name}: {what}", rate, copied) for what, rate in _named(encode, decode, check)]
        rows.append(Row(f"{name}: bits for each value", 8 * len(data) / size, digits=2))
        rows.append(Row(f"{name}: rms error", error, digits=5))
        for kind in OuterKind:
            rows.append(
                Row(f"{name}: fold, {kind.value}", _fold_rate(name, values, kind) / 1e6, "M params/s", digits=0)
            )
    rows.append(_row("state digest", _rate(lambda: digest_of(values.data), values.nbytes), copied))
    show("codec", rows, f"{size:,} float32 values, one thread; MB/s of float32.")


def _named(encode: float, decode: float, check: float) -> tuple[tuple[str, float], ...]:
    return ("encode", encode), ("decode", decode), ("check", check)


def _rate(work: Callable[[], object], size: int) -> float:
    """MB/s of the best of a few runs."""
    work()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return size / min(seconds) / 1e6


def _fold_rate(name: str, values: np.ndarray, kind: OuterKind) -> float:
    chosen = codec(name)
    part = chosen.encode(values)
    outer = Outer(kind, 0.7, 0.9)
    state = initial_state(values.copy(), momentum=outer.keeps_momentum)
    best = float("inf")
    for number in range(REPEATS):
        node, shard = NodeId("n"), Digest("0" * 64)
        listed = Part(0, 0, values.size, digest_of(part), len(part), node, (node,))
        contribution = Contribution(node, 1, (DataRange(0, shard, number, number + 1),))
        head = (RunId("run"), RoundNumber(number), shard, Epoch(0), node)
        record = Record(*head, (contribution,), (listed,), shard)
        started = time.perf_counter()
        fold(state, record, {0: part}, Packing(chosen, chosen), outer)
        best = min(best, time.perf_counter() - started)
    return values.size / best


def _row(what: str, rate: float, copied: float) -> Row:
    return Row(what, rate, "MB/s", digits=0, note=f"{rate / copied:.0%} of a memory copy")


if __name__ == "__main__":
    main()
