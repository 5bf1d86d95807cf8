"""The rule of the audits, played over what was measured, again and again with another luck of who is asked when.

A swarm is measured once, everybody in every round, and nobody is put out; then a thousand lucks take a moment.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import groupby

from coordinator.core import audits
from coordinator.core.audits import Audits, Measured, Rules
from protocol.types import Contribution, DataRange, Digest, Epoch, NodeId, Record, RoundNumber, RunId

Row = tuple[int, int, float, Measured]  # round, node, weight of its contribution
TOKENS = 1000  # of a contribution of weight 1


def accused(rows: Iterable[Row], rules: Rules, luck: random.Random) -> dict[int, int]:
    """Who would be, and after how many rounds."""
    state, out = Audits(), dict[int, int]()
    for number, here in groupby(rows, key=lambda row: row[0]):
        results = {node: (weight, result) for _, node, weight, result in here if node not in out}
        if not results:
            continue
        weights = {node: weight for node, (weight, _) in results.items()}
        state, _ = audits.certified(state, _record(number, weights), rules)
        for ask in state.open:
            node = int(ask.node, 16)
            state, found = audits.measured(state, ask, results[node][1], rules, luck.random())
            if found is not None:
                out[node] = number + 1
    return out


def _record(number: int, weights: dict[int, float]) -> Record:
    contributions = tuple(
        Contribution(
            NodeId(f"{node:064x}"),
            int(TOKENS * weight),
            (DataRange(number, Digest("5" * 64), TOKENS * node, TOKENS * node + audits.SAMPLED),),
            update=Digest(f"{number:04x}{node + 1:060x}"),
        )
        for node, weight in weights.items()
    )
    nobody = Digest("0" * 64)
    return Record(RunId("run"), RoundNumber(number), nobody, Epoch(0), contributions[0].node, contributions, (), nobody)
