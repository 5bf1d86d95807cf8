"""How an averaging grows with the group: real engines, no training. Seconds, processor time and bytes for each peer.

All peers share this machine's cores, so time grows with the work of all of them together; what a peer costs is in the
rows for one peer: processor time and bytes. Bytes of an all-reduce hardly grow, those of an all-gather grow with the
group until the all-reduce is cheaper.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from itertools import product

import numpy as np
import psutil

from node.engine import Engine
from protocol.exchange import Packing, packing_of
from protocol.runspec import UpdateSection
from tests.bench.group import LOCAL, average, engines_of
from tests.bench.table import Row, show


async def measure(packing: Packing, nodes: int, parameters: int, rounds: int) -> tuple[float, float, float]:
    """Of one round: seconds, and for each peer seconds of processor time and bytes sent, whatever carries them."""
    async with engines_of(parameters, packing, [LOCAL] * nodes, enter=lambda index: None) as engines:
        payload = packing.up.encode(np.random.default_rng(0).standard_normal(parameters, np.float32))
        await average(engines, [payload] * nodes, [1] * nodes, parameters, packing)  # connections are made
        busy, sent, seconds = _busy(engines), await _sent(engines), []
        for _ in range(rounds):
            outcomes = await average(engines, [payload] * nodes, [1] * nodes, parameters, packing)
            seconds.append(max(outcome.seconds for outcome in outcomes))
        share = nodes * rounds
        return statistics.median(seconds), (_busy(engines) - busy) / share, (await _sent(engines) - sent) / share


def _busy(engines: Sequence[Engine]) -> float:
    """Processor time of all engines and their p2pd."""
    total = 0.0
    for engine in engines:
        process = psutil.Process(engine.pid)
        for each in (process, *process.children(recursive=True)):
            used = each.cpu_times()
            total += used.user + used.system
    return total


async def _sent(engines: Sequence[Engine]) -> int:
    return sum(usage.sent for usage in await asyncio.gather(*(engine.usage() for engine in engines)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--parameters", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--codecs", nargs="+", default=["int4", "sparse2"])
    parser.add_argument("--rules", nargs="+", default=["clip"], help="the robust rules to compare")
    given = parser.parse_args()
    rows = []
    for name, rule in product(given.codecs, given.rules):
        packing = packing_of(UpdateSection(codec=name, robust=rule))
        for nodes in given.nodes:
            took, busy, sent = asyncio.run(measure(packing, nodes, given.parameters, given.rounds))
            ideal = packing.sent_bytes(given.parameters, nodes)
            rows += [
                Row(f"{name}, {rule}, {nodes} peers: time", took * 1000, "ms", digits=0),
                Row("  processor time of a peer", busy * 1000, "ms", digits=0),
                Row("  sent by a peer", sent / given.parameters, "bytes/parameter", digits=4),
                Row("  to what is encoded", sent / ideal, at_most=1.05, digits=3),
            ]
            print(f"  {name}, {rule}, {nodes} peers: {took:.2f} s", flush=True)
    show("round_scale", rows, f"{given.parameters:,} parameters, {given.rounds} rounds on loopback.")


if __name__ == "__main__":
    main()
