"""Whether three real engines get the same mean, bit for bit, and how far it is from the exact one.

The error is divided by the codec's own bound, so at most 1 is allowed. "Of what was sent" compares with the float64
mean of the decoded contributions: one encoding lies between. "Of the vectors" compares with the float64 mean of the
vectors before they were encoded: the bound is the senders' mean bound plus that of the mean.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.codec import BLOCK_VALUES, Codec, codec
from protocol.exchange import Packing
from protocol.limits import CHUNK_VALUES
from tests.bench.group import LOCAL, average, engines_of
from tests.bench.table import Row, show

WEIGHTS = (1000, 3000, 2000)
DENSE = ("fp16", "int8", "int4")  # an all-gather has no mean to look at: who folds makes it
Floats = NDArray[np.floating[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--parameters", type=int, default=5 * CHUNK_VALUES + 1001)
    given = parser.parse_args()
    rows = [row for name in DENSE for row in asyncio.run(measure(codec(name), given.rounds, given.parameters))]
    show("exactness", rows, f"Three engines, {given.parameters:,} values, {given.rounds} rounds for each codec.")


async def measure(how: Codec, rounds: int, parameters: int) -> list[Row]:
    random, packing = np.random.default_rng(0), Packing(how, how)
    differing, of_sent, of_vectors = 0, 0.0, 0.0
    async with engines_of(parameters, packing, [LOCAL] * len(WEIGHTS), enter=lambda index: None) as engines:
        for _ in range(rounds):
            vectors = [_vector(random, parameters) for _ in WEIGHTS]
            payloads = [how.encode(vector) for vector in vectors]
            outcomes = await average(engines, payloads, WEIGHTS, parameters, packing)
            differing += any(outcome.parts != outcomes[0].parts for outcome in outcomes)
            mean = how.decode(b"".join(outcomes[0].parts[index] for index in range(len(WEIGHTS))), parameters)
            sent = [how.decode(payload, parameters) for payload in payloads]
            exact = _weighted(sent)
            bound = _bound(how, exact)
            of_sent = max(of_sent, float((np.abs(mean - exact) / bound).max()))
            whole = bound + _weighted([_bound(how, vector) for vector in vectors])
            of_vectors = max(of_vectors, float((np.abs(mean - _weighted(vectors)) / whole).max()))
    return [
        Row(f"{how.name}: rounds whose results differ", differing, f"of {rounds}", at_most=0, digits=0),
        Row(f"{how.name}: error of the mean of what was sent", of_sent, "bounds", at_most=1),
        Row(f"{how.name}: error of the mean of the vectors", of_vectors, "bounds", at_most=1),
    ]


def _vector(random: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Heavy tails and blocks of very different size, as gradients have them."""
    scales = 10.0 ** random.uniform(-6, 0, size=-(-size // BLOCK_VALUES))
    spread = np.repeat(scales, BLOCK_VALUES)[:size]
    return (random.standard_t(4, size) * spread).astype(np.float32)


def _weighted(vectors: list[NDArray[Any]]) -> NDArray[np.float64]:
    total = sum(weight * vector.astype(np.float64) for weight, vector in zip(WEIGHTS, vectors, strict=True))
    return np.asarray(total / sum(WEIGHTS))


def _bound(how: Codec, values: Floats) -> NDArray[np.float64]:
    """The codec's bound for each value, from its block's peak. Blocks begin anew with each chunk, at a multiple."""
    padded = np.zeros(-(-values.size // BLOCK_VALUES) * BLOCK_VALUES)
    padded[: values.size] = np.abs(values)
    peaks = padded.reshape(-1, BLOCK_VALUES).max(axis=1)
    return np.repeat([how.error_max(float(peak)) for peak in peaks], BLOCK_VALUES)[: values.size]


if __name__ == "__main__":
    main()
