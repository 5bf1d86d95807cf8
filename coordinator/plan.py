"""The plan: what a run will ask of its nodes and of its data, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.exchange import packing_of
from protocol.runspec import RoundsSection, RunSpec

TRAINER_BYTES: Final = 16  # of a parameter: weights, gradients, and the optimizer's two moments, in float32
HELPER_BYTES: Final = 16  # of a parameter, in the node's other processes: shared vectors, codec buffers
HELPERS_BYTES: Final = 600 << 20  # what those processes take without any model
LOGIT_BYTES: Final = 12  # of one logit: itself, its float32 copy, and its gradient


@dataclass(frozen=True)
class Plan:
    parameters: int
    nodes: int  # that the numbers below are for
    update_bytes: int  # one encoded vector
    round_bytes: int  # that a node sends in a round with so many nodes, and receives
    round_bytes_many: int  # the same with ever more nodes
    sequences_first: int  # of one node in the first round
    sequences_last: int
    tokens_available: int
    tokens_planned: int | None  # by all nodes; none when the run is endless
    passes: float | None  # over the data
    memory_trainer_bytes: int  # with one sequence at a time, without activations
    memory_helpers_bytes: int


def plan(spec: RunSpec, *, parameters: int, vocabulary: int, sequences: int) -> Plan:
    """For the fewest nodes that train together. `sequences` is what the data holds."""
    nodes = max(2, spec.run.min_nodes)  # one alone sends nothing to anybody
    packing = packing_of(spec.update)
    batch, context = spec.train.batch_sequences, spec.data.context
    planned = None
    if spec.run.rounds:
        planned = steps_in(spec.rounds, spec.run.rounds) * batch * context * spec.run.min_nodes
    return Plan(
        parameters=parameters,
        nodes=nodes,
        update_bytes=packing.up.encoded_bytes(parameters),
        round_bytes=packing.sent_bytes(parameters, nodes),
        round_bytes_many=packing.up.encoded_bytes(parameters) + packing.down.encoded_bytes(parameters),
        sequences_first=spec.rounds.steps(0) * batch,
        sequences_last=spec.rounds.steps(max(0, spec.run.rounds - 1) if spec.run.rounds else 1 << 40) * batch,
        tokens_available=sequences * context,
        tokens_planned=planned,
        passes=None if planned is None or not sequences else planned / (sequences * context),
        memory_trainer_bytes=TRAINER_BYTES * parameters + LOGIT_BYTES * vocabulary * context,
        memory_helpers_bytes=HELPER_BYTES * parameters + HELPERS_BYTES,
    )


def steps_in(section: RoundsSection, rounds: int) -> int:
    """Inner steps of one node in the first so many rounds."""
    total = 0
    for count, steps in section.inner_steps:
        taken = min(count, rounds)
        total += taken * steps
        rounds -= taken
    return total + rounds * section.inner_steps[-1][1]
