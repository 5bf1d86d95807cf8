"""Local progress: what a save costs the disk and the daemon, how long a peek holds the trainer up, and how often it is.

A save is u = residual + (shared - local), computed, hashed, written and flushed to the disk of --folder. A peek is
measured from the order to the answer at a trainer that waits for data, so all of it is what would lie between two
steps, with the way there and back.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from node.progress import TIME_SHARE, Pace, Progress, ProgressFile
from node.training import Trainer, TrainerSpec, Vectors
from protocol.types import Contribution, DataRange, Digest, Head, NodeId, RoundNumber
from tests.bench.table import Row, show
from tests.bench.trainer import CONTEXT, TRAIN, VOCABULARY, config

HIDDEN = {"1M": 144, "20M": 640, "100M": 1440}
REPEATS = 5
DATA = DataRange(0, Digest("0" * 64), 0, 1)
PROGRESS = Progress(Head(RoundNumber(0), DATA.shard), 0, 0, Contribution(NodeId("0" * 64), CONTEXT, (DATA,)), False)


def save_and_load(size: int, folder: Path) -> tuple[float, float]:
    """Seconds of each, the median of some."""
    residual, shared, local = (np.full(size, value, np.float32) for value in (1e-3, 0.5, 0.25))
    file = ProgressFile(folder / "progress", size, room=lambda size: True, now=time.monotonic())
    saves = [
        _seconds(lambda m=missed: file.save(replace(PROGRESS, missed=m), residual, shared=shared, local=local))  # type: ignore[misc]
        for missed in range(REPEATS)
    ]
    loads = [_seconds(file.load) for _ in range(REPEATS)]
    file.forget()
    return statistics.median(saves), statistics.median(loads)


async def peek(hidden: int, folder: Path, threads: int) -> tuple[int, float]:
    """How many parameters, and the seconds that a trainer takes to be looked at: the median of some."""
    from protocol import model

    made = config(hidden)
    size = model.measure(made)
    vectors = Vectors.create(size.parameters, runtime_dir=folder)
    vectors.shared[:] = model.initial_vector(made, 0)
    train = TRAIN | {"batch_sequences": 1}
    spec = TrainerSpec(made, size.parameters, size.digest, VOCABULARY, CONTEXT, 2, train, threads=threads)
    trainer = await Trainer.start(spec, vectors=vectors, log=None, on_event=lambda event: None)
    await trainer.peek()  # the first touches the pages
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        await trainer.peek()
        seconds.append(time.perf_counter() - began)
    await trainer.stop()
    vectors.close()
    return size.parameters, statistics.median(seconds)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=HIDDEN, default=list(HIDDEN))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: where temporary files go")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        for title in given.models:
            parameters, peeked = asyncio.run(peek(HIDDEN[title], folder, given.threads))
            saved, loaded = save_and_load(parameters, folder)
            size = 4 * parameters
            spacing = Pace.begin(0.0, size).saved(0.0, size, took_seconds=saved).spacing_seconds
            rows += [
                Row(f"{title}: a save", 1e3 * saved, "ms", digits=0, note=f"{size / saved / 1e6:,.0f} MB/s"),
                Row(f"{title}: a load", 1e3 * loaded, "ms", digits=0, note=f"{size / loaded / 1e6:,.0f} MB/s"),
                Row(f"{title}: a peek", 1e3 * peeked, "ms", digits=1, note=f"{size / peeked / 1e6:,.0f} MB/s"),
                Row(f"{title}: between two saves", spacing, "s", digits=0),
                Row(f"{title}: written in an hour", size * 3600 / spacing / 1e9, "GB", at_most=3.8, digits=2),
                Row(f"{title}: of the time, saving", 100 * saved / spacing, "%", at_most=100 * TIME_SHARE, digits=2),
                Row(f"{title}: of the time, the trainer held up", 100 * peeked / spacing, "%", at_most=0.1, digits=3),
            ]
    show("progress", rows, f"Median of {REPEATS}; SHA-256, fsync and rename included.")


if __name__ == "__main__":
    main()
