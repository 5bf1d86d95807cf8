"""Codec bench: MB/s of float32 in and out, one thread, next to a memory copy; and fold in parameters/s.

python -m tests.bench.codec [values]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from protocol.blobs import digest_of
from protocol.codec import NAMES, codec
from protocol.fold import Outer, OuterKind, fold
from protocol.limits import CHUNK_VALUES
from protocol.state import initial_state
from protocol.types import Contribution, DataRange, Digest, Epoch, NodeId, Part, Record, RoundNumber, RunId

REPEATS = 5  # the best counts: the rest is other programs


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 256 * CHUNK_VALUES
    values = (np.random.default_rng(0).standard_normal(size) * 1e-3).astype(np.float32)
    out = np.zeros_like(values)
    copied = _rate(lambda: np.copyto(out, values), values.nbytes)
    print(f"{size:,} float32 values, one thread; MB/s of float32, and as a share of a memory copy")
    print(f"{'':6}  {'bits':>6}  {'encode':>14}  {'decode':>14}  {'check':>14}  {'rms error':>9}")
    print(f"{'copy':6}  {32:6.2f}  {_cell(copied, copied)}  {_cell(copied, copied)}")
    for name in NAMES:
        chosen = codec(name)
        room = np.zeros(chosen.encoded_bytes(size), np.uint8)
        encode = _rate(lambda: chosen.encode_into(values, room), values.nbytes)  # noqa: B023
        data = room.tobytes()
        decode = _rate(lambda: chosen.decode_into(data, out), values.nbytes)  # noqa: B023
        check = _rate(lambda: chosen.check(data, size), values.nbytes)  # noqa: B023
        error = float(np.sqrt(np.mean((out - values) ** 2)) / np.sqrt(np.mean(values**2)))
        cells = "  ".join(_cell(rate, copied) for rate in (encode, decode, check))
        print(f"{name:6}  {8 * len(data) / size:6.2f}  {cells}  {error:9.5f}")
    print(f"\n{'fold':6}  {'average':>22}  {'nesterov':>22}")
    for name in NAMES:
        rates = "  ".join(f"{_fold_rate(name, values, kind) / 1e6:10.0f} M params/s" for kind in OuterKind)
        print(f"{name:6}  {rates}")
    digest = _rate(lambda: digest_of(values.data), values.nbytes)
    print(f"\nstate digest: {digest:.0f} MB/s")


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
        fold(state, record, {0: part}, chosen, outer)
        best = min(best, time.perf_counter() - started)
    return values.size / best


def _cell(rate: float, copied: float) -> str:
    return f"{rate:8.0f} {rate / copied:5.0%}"


if __name__ == "__main__":
    main()
