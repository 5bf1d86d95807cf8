"""What the robust rules cost a peer in one round: processor time of its reduction, beside that of what it trains meanwhile.

In one thread and without a network: a peer of an all-reduce checks, averages and encodes its slice of everybody's update;
in an all-gather it averages all of everybody's. A rule's cost is what it takes beyond the plain mean. Goals are shares of the
round's processor time: that of the plain mean and of the inner steps of the shortest round that the defaults know.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from node import workloads
from protocol import model
from protocol.codec import codec
from protocol.exchange import Packing
from protocol.limits import CHUNK_VALUES
from protocol.robust import Rule, means
from protocol.runspec import TrainSection
from tests.bench import llama
from tests.bench.table import Row, show

VOCABULARY, CONTEXT = 256, 256
SHARE_MAX = 0.10  # of a round's processor time
TIMES = 5  # the least of so many is taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="inner steps of a round")
    parser.add_argument("--sequences", type=int, default=TrainSection().batch_sequences, help="of an inner step")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = llama.config(given.hidden, given.layers, vocabulary=VOCABULARY, context=CONTEXT)
    parameters = model.measure(config).parameters
    step = least(training(config)) * given.sequences
    rows = [Row(f"an inner step of {given.sequences} sequences, as so many of one", step * 1000, "ms", digits=0)]
    for name in ("int4", "sparse2"):
        packing = Packing(codec(name), codec("int4"))
        gathers = packing.up.sparse
        values = parameters if gathers else -(-parameters // given.peers // CHUNK_VALUES) * CHUNK_VALUES
        slices = [packing.up.encode(vector(seed, values)) for seed in range(given.peers)]
        rules = (Rule.MEAN, Rule.CLIP) if gathers else tuple(Rule)
        took = {rule: least(partial(reduce, packing, rule, slices, values)) for rule in rules}
        whole = took[Rule.MEAN] + given.steps * step
        what = "folding what everybody brought" if gathers else "a peer's reduction"
        rows.append(Row(f"{name}, {given.peers} peers: {what}, plain mean", took[Rule.MEAN] * 1000, "ms", digits=1))
        for rule in rules[1:]:
            more = took[rule] - took[Rule.MEAN]
            rows.append(Row(f"  {rule.value}: more than that", more * 1000, "ms", digits=1))
            rows.append(Row("  of the round's processor time", more / whole, at_most=SHARE_MAX))
    show(
        "robust",
        rows,
        f"{parameters:,} parameters, rounds of {given.steps} inner steps of {given.sequences} sequences.",
    )


def reduce(packing: Packing, rule: Rule, slices: list[bytes], values: int) -> None:
    for data in slices:
        packing.up.check(data, values)
    for _, mean in means(rule, packing.up, slices, [1] * len(slices), values):
        if not packing.up.sparse:
            packing.down.encode(mean)


def training(config: str) -> Callable[[], None]:
    workload = workloads.load("causal_lm")
    module = workload.build(config).train()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (1, CONTEXT + 1)))

    def step() -> None:
        workload.loss(module, tokens[:, :-1], tokens[:, 1:]).backward()

    return step


def vector(seed: int, values: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(values, np.float32)


def least(work: Callable[[], None]) -> float:
    times = []
    for _ in range(TIMES):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


if __name__ == "__main__":
    main()
