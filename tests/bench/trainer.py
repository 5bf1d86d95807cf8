"""Tokens per second of the trainer's process beside a bare torch loop.

Both train the same model on the same data with the same optimizers, threads and batch, each in a process of its
own, in alternating pairs of one run, so that a busy machine hits both. On a machine that is busy with other
things, tokens per second of processor time say more than those by the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from node.training import Stepped, Trainer, TrainerSpec, Vectors
from protocol.types import DataRange, Digest
from tests.bench import llama
from tests.bench.table import Row, show

CONTEXT = 128
VOCABULARY = 256
WARM_STEPS = 5
TRAIN = {"optimizer": "muon", "learning_rate": 3e-3, "batch_sequences": 16, "warmup_steps": 10, "clip": 1.0}


def text(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The standard library's own source, as bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    joined = b"\n".join(path.read_bytes() for path in files)
    return np.frombuffer((joined * (size // len(joined) + 1))[:size], np.uint8)


def bare_loop(path: Path, steps: int, model_config: str, threads: int) -> tuple[float, float]:
    """What anyone would write: the model, the optimizers, a loop. Tokens per second by clock and processor time."""
    import torch
    from torch.nn import functional

    from node.muon import Float32Muon
    from protocol import model

    torch.set_num_threads(threads)
    module = model.build(model_config).train()
    matrices = [each for name, each in module.named_parameters() if each.ndim == 2 and "embed" not in name]
    rest = [each for name, each in module.named_parameters() if each.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        Float32Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
    ]
    tokens = np.fromfile(path, "<u2")
    batch = 16 * CONTEXT
    for step in range(WARM_STEPS + steps):
        if step == WARM_STEPS:
            began, began_cpu = time.perf_counter(), time.process_time()
        here = torch.from_numpy(tokens[step * batch : (step + 1) * batch + 1].astype(np.int64))
        logits = module(input_ids=here[:-1].view(16, CONTEXT), use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), here[1:])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss.item()
    tokens_done = steps * batch
    return tokens_done / (time.perf_counter() - began), tokens_done / (time.process_time() - began_cpu)


async def ours(path: Path, steps: int, hidden: int, threads: int, folder: Path) -> tuple[float, float, float]:
    """Tokens per second by the clock and by processor time, from goal to goal, and the seconds to start."""
    from protocol import model

    made = llama.config(hidden, vocabulary=VOCABULARY, context=CONTEXT)
    size = model.measure(made)
    vectors = Vectors.create(size.parameters, runtime_dir=folder)
    vectors.shared[:] = model.initial_vector(made, 0)
    spec = TrainerSpec(made, size.parameters, size.digest, VOCABULARY, CONTEXT, 2, TRAIN, threads=threads)
    reached: asyncio.Queue[tuple[float, float, Stepped]] = asyncio.Queue()

    def on_event(event: object) -> None:
        if isinstance(event, Stepped):
            used = psutil.Process(trainer.pid).cpu_times()
            reached.put_nowait((time.perf_counter(), used.user + used.system, event))

    trainer = await Trainer.start(spec, vectors=vectors, log=None, on_event=on_event)
    sequences = (WARM_STEPS + steps) * 16
    await trainer.add_data([(DataRange(0, Digest("00" * 32), 0, sequences), path)])
    times = []
    await trainer.goal(WARM_STEPS)
    await trainer.run()
    for goal in (WARM_STEPS, WARM_STEPS + steps):
        await trainer.goal(goal)
        while True:
            at, at_cpu, event = await reached.get()
            if event.steps >= goal:
                break
        times.append((at, at_cpu, event.tokens))
    await trainer.stop()
    vectors.close()
    (began, began_cpu, before), (ended, ended_cpu, after) = times
    done = after - before
    return done / (ended - began), done / (ended_cpu - began_cpu), trainer.started.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare is not None:
        made = llama.config(given.hidden, vocabulary=VOCABULARY, context=CONTEXT)
        print(*bare_loop(given.bare, given.steps, made, given.threads))
        return
    pairs, starts = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        path.write_bytes(text((WARM_STEPS + given.steps) * 16 * CONTEXT + 1).astype("<u2").tobytes())
        for _ in range(given.pairs):
            clock, cpu, start = asyncio.run(ours(path, given.steps, given.hidden, given.threads, Path(folder)))
            command = [sys.executable, "-m", "tests.bench.trainer", "--bare", str(path)]
            numbers = ["--steps", str(given.steps), "--hidden", str(given.hidden), "--threads", str(given.threads)]
            bare_clock, bare_cpu = map(float, subprocess.check_output(command + numbers).split()[-2:])
            pairs.append((clock / bare_clock, cpu / bare_cpu, clock, bare_clock))
            starts.append(start)
    by_clock, by_cpu, ours_clock, bare = (statistics.median(each) for each in zip(*pairs, strict=True))
    show(
        "trainer",
        [
            Row("trainer / bare loop, by the clock", by_clock, note=" ".join(f"{each[0]:.3f}" for each in pairs)),
            Row("trainer / bare loop, by processor time", by_cpu, note=" ".join(f"{each[1]:.3f}" for each in pairs)),
            Row("trainer", ours_clock, "tokens/s", digits=0),
            Row("bare loop", bare, "tokens/s", digits=0),
            Row("start of the trainer, until the first possible step", statistics.median(starts), "s", digits=1),
        ],
        f"Median of {given.pairs} pairs of {given.steps} steps, {given.threads} thread each. No goal was set.",
    )


if __name__ == "__main__":
    main()
