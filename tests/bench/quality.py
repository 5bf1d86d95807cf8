"""Loss per byte: K workers in one process against data-parallel training, on the same tokens in the same order.

The workers are the product's own: its inner loop, its codecs with error feedback, its fold. Only the network, the
votes and the disk are left out. Every row sees the same tokens: a data-parallel step takes the batches of all workers
together. Loss is that of the shared parameters on text that nobody trained on.

    make bench PART=quality ARGS="--workers 4 --steps 600 --seeds 2"
    python -m tests.bench.quality --workers 2 4 8 --hidden 512 --layers 8 --device cuda
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from node import leftover, workloads
from node.pseudograd import PseudoGradient
from node.trainer import Learner
from node.training import TrainerSpec, Vectors
from protocol import model
from protocol.blobs import digest_of
from protocol.codec import Codec, Doubles, Floats, Octets, codec
from protocol.exchange import Packing, layout
from protocol.fold import Outer, OuterKind, fold
from protocol.robust import Rule, means
from protocol.runspec import RoundsSection, cosine_share
from protocol.state import State, initial_state
from protocol.types import Contribution, DataRange, Digest, Epoch, Exchange, NodeId, Part, Record, Role, RunId
from tests.bench import llama
from tests.bench.table import Row, show

VOCABULARY = 256
HELDOUT_SEQUENCES = 128
SHARD, NOBODY = Digest("0" * 64), Digest("1" * 64)
GROWING = RoundsSection().inner_steps
EVEN, OFTEN = ((1, 25),), ((1, 2),)
MUON = {"optimizer": "muon", "learning_rate": 3e-3, "muon_learning_rate": 0.02}
ADAMW = {"optimizer": "adamw", "learning_rate": 3e-3}
AVERAGE = Outer()
FURTHER = Outer(OuterKind.AVERAGE, 2.0)
DILOCO = Outer(OuterKind.NESTEROV, 0.7, 0.9)


class Whole(Codec):
    """float32 as it is: what compression is compared with."""

    name = "fp32"
    bits = 32.0

    def error_max(self, peak: float) -> float:
        return 0.0

    def _chunk_bytes(self, values: int) -> int:
        return 4 * values

    def _encode_chunk(self, values: Floats, out: Octets, room: object) -> None:
        out.view(np.float32)[:] = values

    def _check_chunk(self, octets: Octets, values: int, room: object) -> None:
        pass

    def _decode_chunk(self, octets: Octets, out: Floats, room: object) -> None:
        out[:] = octets.view(np.float32)

    def _chunk_squares(self, octets: Octets, values: int, room: object) -> Doubles:
        return np.square(octets.view(np.float32), dtype=np.float64)


FP32 = Whole()
INT4, SPARSE2 = codec("int4"), codec("sparse2")


@dataclass(frozen=True)
class Recipe:
    """One way to train. Without a packing it is data-parallel: one model, the batches of all workers in each step."""

    name: str
    train: dict[str, Any]
    packing: Packing | None = None
    outer: Outer = AVERAGE
    schedule: tuple[tuple[int, int], ...] = GROWING
    residual_decay: float = 1.0
    paces: tuple[int, ...] = (1,)  # a worker makes every so-many-th step, and brings so many tokens fewer


RECIPES = (
    Recipe("data-parallel AdamW", ADAMW),
    Recipe("data-parallel Muon", MUON),
    Recipe("DiLoCo: AdamW, fp32, Nesterov, rounds of 25", ADAMW, Packing(FP32, FP32), DILOCO, EVEN),
    Recipe("AdamW, fp32, growing rounds", ADAMW, Packing(FP32, FP32)),
    Recipe("AdamW, int4, growing rounds", ADAMW, Packing(INT4, INT4)),
    Recipe("AdamW, sparse2, growing rounds", ADAMW, Packing(SPARSE2, INT4), residual_decay=0.95),
    Recipe("AdamW, fp32, rounds of 2", ADAMW, Packing(FP32, FP32), schedule=OFTEN),
    Recipe("AdamW, sparse2, rounds of 2", ADAMW, Packing(SPARSE2, INT4), schedule=OFTEN, residual_decay=0.95),
    Recipe("Muon, fp32, rounds of 25", MUON, Packing(FP32, FP32), schedule=EVEN),
    Recipe("Muon, fp32, growing rounds", MUON, Packing(FP32, FP32)),
    Recipe("Muon, int4, growing rounds", MUON, Packing(INT4, INT4)),
    Recipe("Muon, sparse2, growing rounds", MUON, Packing(SPARSE2, INT4), residual_decay=0.95),
    Recipe("Muon, sparse2 and its means too, growing rounds", MUON, Packing(SPARSE2, SPARSE2), residual_decay=0.95),
    Recipe("Muon, sparse2, growing rounds, outer times 2", MUON, Packing(SPARSE2, INT4), FURTHER, residual_decay=0.95),
    Recipe("Muon, fp32, rounds of 2", MUON, Packing(FP32, FP32), schedule=OFTEN),
    Recipe("Muon, sparse2, rounds of 2", MUON, Packing(SPARSE2, INT4), schedule=OFTEN, residual_decay=0.95),
    Recipe(
        "Muon, sparse2, rounds of 2, outer times 2", MUON, Packing(SPARSE2, INT4), FURTHER, OFTEN, residual_decay=0.95
    ),
    Recipe("Muon, sparse2, rounds of 25", MUON, Packing(SPARSE2, INT4), schedule=EVEN, residual_decay=0.95),
)


def defaults() -> tuple[Recipe, ...]:
    """What the defaults were chosen from: the robust rule; outer step, rounds and residual decay, for each codec."""
    base = Recipe("Muon, fp32, growing rounds", MUON, Packing(FP32, FP32))
    codecs = (("int4", Packing(INT4, INT4), 1.0, (0.95,)), ("sparse2", Packing(SPARSE2, INT4), 0.95, (1.0, 0.8)))
    outers = (
        ("average", AVERAGE),
        ("average times 0.8", Outer(OuterKind.AVERAGE, 0.8)),
        ("average times 1.5", Outer(OuterKind.AVERAGE, 1.5)),
        ("average times 2", FURTHER),
        ("Nesterov 0.7, 0.9", DILOCO),
        ("Nesterov 0.9, 0.5", Outer(OuterKind.NESTEROV, 0.9, 0.5)),
    )
    rows = [base]
    rows += [replace(base, name=f"int4, {rule.value}", packing=Packing(INT4, INT4, rule)) for rule in Rule]
    for rule in (Rule.MEAN, Rule.CLIP):
        uneven = replace(base, packing=Packing(INT4, INT4, rule), paces=(1, 2, 4, 8))
        rows.append(replace(uneven, name=f"int4, {rule.value}, steps of a half, a quarter and an eighth"))
    for name, packing, decay, others in codecs:
        usual = replace(base, packing=packing, residual_decay=decay)
        rows += [replace(usual, name=f"{name}, outer {what}", outer=outer) for what, outer in outers]
        rows += [replace(usual, name=f"{name}, rounds of {steps}", schedule=((1, steps),)) for steps in (10, 50)]
        rows += [replace(usual, name=f"{name}, residual times {kept}", residual_decay=kept) for kept in others]
        rows.append(replace(usual, name=f"{name}, AdamW inside", train=ADAMW))
    return tuple(rows)


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share."""

    config: str
    context: int
    batch: int
    steps: int
    workers: int
    seed: int
    device: str
    threads: int
    decay_to: float

    @property
    def size(self) -> model.Size:
        return model.measure(self.config)


@dataclass(frozen=True)
class Outcome:
    loss: float  # of the shared parameters, held out
    sent: float  # bytes per parameter that one worker uploads in all, by arithmetic
    rounds: int
    seconds: float


class Text:
    """The standard library's own source as bytes, in one order for every recipe of a seed."""

    def __init__(self, setting: Setting) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        tokens = np.frombuffer(b"\n".join(path.read_bytes() for path in files), np.uint8)
        context = setting.context
        table = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]
        order = np.random.default_rng(setting.seed).permutation(len(table))
        wanted = setting.steps * setting.workers * setting.batch
        if wanted + HELDOUT_SEQUENCES > len(table):
            raise SystemExit(f"the text has {len(table):,} sequences, {wanted + HELDOUT_SEQUENCES:,} are wanted")
        self.heldout = table[np.sort(order[:HELDOUT_SEQUENCES])].astype(np.int64)
        self._table, self._order = table, order[HELDOUT_SEQUENCES:]
        self._shape = (setting.steps, setting.workers, setting.batch)

    def batch(self, step: int, worker: int | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Inputs and targets of one worker's step, or of all workers together."""
        steps, workers, batch = self._shape
        chosen = self._order[: steps * workers * batch].reshape(steps, workers * batch)[step]
        if worker is not None:
            chosen = chosen[worker * batch : (worker + 1) * batch]
        runs = self._table[chosen].astype(np.int64)
        return np.ascontiguousarray(runs[:, :-1]), np.ascontiguousarray(runs[:, 1:])


class Worker:
    """A learner and its pseudo-gradient, without a network."""

    def __init__(self, setting: Setting, recipe: Recipe, state: State, folder: Path, batch: int) -> None:
        size = setting.size
        self.vectors = Vectors.create(size.parameters, runtime_dir=folder)
        self.vectors.shared[:] = state.params
        train = {**recipe.train, "batch_sequences": batch, "warmup_steps": 20, "weight_decay": 0.01}
        spec = TrainerSpec(
            setting.config,
            size.parameters,
            size.digest,
            VOCABULARY,
            setting.context,
            2,
            train,
            seed=setting.seed,
            device=setting.device,
            threads=setting.threads,
        )
        self.learner = Learner(spec, self.vectors)
        up = recipe.packing.up if recipe.packing else FP32
        self.steps = 0  # since it last brought something
        self.gradient = PseudoGradient(
            self.vectors.shared, self.vectors.snapshot, up, residual_decay=recipe.residual_decay
        )

    def step(self, text: Text, number: int, worker: int | None) -> None:
        inputs, targets = text.batch(number, worker)
        loss = self.learner.step(inputs, targets, lambda: False)
        assert loss is not None and loss == loss, "a step was rejected"
        self.steps += 1

    def bring(self) -> bytes:
        self.gradient.expect_snapshot()
        self.learner.save()
        self.gradient.take_snapshot()
        return self.gradient.payload

    def take(self, state: State, parts: Sequence[Part]) -> None:
        self.vectors.shared[:] = state.params
        self.steps = 0
        self.gradient.settle(parts)
        self.learner.merge()


def train(setting: Setting, recipe: Recipe, folder: Path) -> Outcome:
    began = time.perf_counter()
    text = Text(setting)
    momentum = recipe.outer.keeps_momentum
    state = initial_state(model.initial_vector(setting.config, setting.seed), momentum=momentum)
    with ExitStack() as owned:

        def worker(batch: int) -> Worker:
            made = Worker(setting, recipe, state, folder, batch)
            owned.callback(made.vectors.close)
            return made

        if recipe.packing is None:
            alone = worker(setting.workers * setting.batch)
            for number in range(setting.steps):
                alone.learner.rate_share = cosine_share(number / setting.steps, setting.decay_to)
                alone.step(text, number, None)
            alone.learner.save()
            loss = held_out(setting, alone.vectors.snapshot, text)
            return Outcome(loss, 4 * 2 * setting.steps * (setting.workers - 1) / setting.workers, 0, _since(began))
        workers = [worker(setting.batch) for _ in range(setting.workers)]
        done = rounds = 0
        left: leftover.Leftover | None = None
        for steps in _rounds(recipe.schedule, setting.steps):
            for each in workers:
                each.learner.rate_share = cosine_share(done / setting.steps, setting.decay_to)
            for number in range(done, done + steps):
                for index, each in enumerate(workers):
                    if not (number - done) % recipe.paces[index % len(recipe.paces)]:
                        each.step(text, number, index)
            done, rounds = done + steps, rounds + 1
            left = exchange(state, workers, recipe, left)
        parameters = state.params.size
        sent = rounds * recipe.packing.sent_bytes(parameters, setting.workers) / parameters
        return Outcome(held_out(setting, state.params, text), sent, rounds, _since(began))


def exchange(
    state: State, workers: Sequence[Worker], recipe: Recipe, before: leftover.Leftover | None
) -> leftover.Leftover | None:
    """One round: the record that a swarm would have certified, folded by everyone. What sparse means left out."""
    packing, size = recipe.packing, state.params.size
    assert packing is not None
    tokens = [worker.steps for worker in workers]
    payloads = [worker.bring() for worker in workers]
    nodes = [NodeId(f"n{index}") for index in range(len(workers))]
    parts: dict[int, bytes] = {}
    how = packing.exchange([Role.PEER] * len(workers))
    if how is Exchange.ALL_REDUCE:
        shares, left = layout(how, size, [Role.PEER] * len(workers)), np.zeros(size, np.float32)
        for index, (start, stop) in enumerate(shares):
            if start == stop:
                continue
            slices = [payload[slice(*map(packing.up.encoded_bytes, (start, stop)))] for payload in payloads]
            mean = np.empty(stop - start, np.float32)
            for at, chunk in means(packing.rule, packing.up, slices, tokens, stop - start):
                mean[at : at + chunk.size] = chunk
            if packing.down.sparse:
                encoded = leftover.encode(mean, start, packing.down, before, recipe.residual_decay)
                parts[index], left[start:stop] = encoded
            else:
                parts[index] = packing.down.encode(mean)
        before = leftover.Leftover(0, left) if packing.down.sparse else None
        listed = tuple(
            Part(i, *shares[i], digest_of(data), len(data), nodes[i], tuple(nodes)) for i, data in parts.items()
        )
    else:
        parts = dict(enumerate(payloads))
        listed = tuple(
            Part(i, 0, size, digest_of(parts[i]), len(parts[i]), node, (node,)) for i, node in enumerate(nodes)
        )
    used = tuple(
        Contribution(node, tokens[i], (DataRange(int(state.round), SHARD, 2 * i, 2 * i + 1),))
        for i, node in enumerate(nodes)
    )
    record = Record(RunId("run"), state.round, NOBODY, Epoch(0), nodes[0], used, listed, NOBODY, how)
    fold(state, record, parts, packing, recipe.outer)
    for index, worker in enumerate(workers):
        worker.take(state, [part for part in listed if nodes[index] in part.included])
    return before


def _rounds(schedule: Sequence[tuple[int, int]], steps: int) -> Iterator[int]:
    """The inner steps of each round; the last one ends where the tokens do."""
    section, number = RoundsSection(inner_steps=tuple(schedule)), 0
    while steps:
        taken = min(steps, section.steps(number))
        yield taken
        steps, number = steps - taken, number + 1


@torch.inference_mode()
def held_out(setting: Setting, vector: Floats, text: Text) -> float:
    workload = workloads.load("causal_lm")
    module = workload.build(setting.config).to(setting.device).eval()
    model.load(module, np.ascontiguousarray(vector))
    total = 0.0
    for rows in np.array_split(text.heldout, 16):
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(each)) for each in (rows[:, :-1], rows[:, 1:]))
        total += float(workload.loss(module, inputs.to(setting.device), targets.to(setting.device)))
    return total / (len(text.heldout) * setting.context)


def _since(began: float) -> float:
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[4])
    parser.add_argument("--steps", type=int, default=600, help="of each worker")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="sequences of each worker's step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decay-to", type=float, default=0.1, help="share of the learning rates at the end")
    parser.add_argument("--muon-rate", type=float, default=MUON["muon_learning_rate"])
    parser.add_argument("--defaults", action="store_true", help="the rows that the defaults were chosen from, instead")
    parser.add_argument("--only", nargs="*", default=[""], help="words of the recipes to run")
    given = parser.parse_args()
    config = llama.config(given.hidden, given.layers, vocabulary=VOCABULARY, context=given.context)
    base = Setting(config, given.context, given.batch, given.steps, 0, 0, given.device, given.threads, given.decay_to)
    muon = {**MUON, "muon_learning_rate": given.muon_rate}
    chosen = [
        replace(recipe, train=muon) if recipe.train is MUON else recipe
        for recipe in (defaults() if given.defaults else RECIPES)
        if any(word in recipe.name for word in given.only)
    ]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="barnraise-bench-") as folder:
        for workers in given.workers:
            rows += _table(replace(base, workers=workers), chosen, range(given.seeds), Path(folder))
    tokens = given.steps * given.batch * given.context
    show(
        "defaults" if given.defaults else "quality",
        rows,
        f"{base.size.parameters:,} parameters, {tokens:,} tokens for each worker, {given.seeds} seeds, learning rates that"
        f" fall to {given.decay_to:g} of themselves; held-out loss of",
        "the shared parameters, in nats for each byte. Bytes are what one worker uploads for each parameter, in all.",
    )


def _table(setting: Setting, recipes: Sequence[Recipe], seeds: range, folder: Path) -> Iterator[Row]:
    reference: float | None = None
    for recipe in recipes:
        outcomes = [train(replace(setting, seed=seed), recipe, folder) for seed in seeds]
        losses = [outcome.loss for outcome in outcomes]
        mean, last = fmean(losses), outcomes[-1]
        reference = mean if reference is None else reference
        note = f"{mean / reference - 1:+.1%} of the first; {last.sent:,.2f} bytes in {last.rounds} rounds"
        spread = f"; seeds from {min(losses):.4f} to {max(losses):.4f}" if len(losses) > 1 else ""
        row = Row(f"{setting.workers} workers: {recipe.name}", mean, digits=4, note=f"{note}{spread}")
        print(f"  {row.what}: {mean:.4f}  {row.note}  ({last.seconds:.0f} s)", flush=True)
        yield row


if __name__ == "__main__":
    main()
