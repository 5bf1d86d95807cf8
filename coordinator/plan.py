"""The plan: what a run will ask of its nodes and of its data, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.codec import NAMES
from protocol.exchange import packing_of, round_seconds
from protocol.fold import outer_of
from protocol.runspec import RunSpec
from protocol.types import Role

TRAINER_BYTES: Final = 16  # of a parameter: weights, gradients, and the optimizer's two moments, in float32
HELPER_BYTES: Final = 16  # of a parameter, in the node's other processes: shared vectors, codec buffers
LEFTOVER_BYTES: Final = 12  # of a parameter that a node reduces to sparse means: three attempts' leftovers
MOMENTUM_BYTES: Final = 4  # of a parameter, where the outer optimizer keeps a momentum
HELPERS_BYTES: Final = 600 << 20  # what those processes take without any model
GROUPS: Final = (2, 8, 32)  # for which the codecs are compared
LOGIT_BYTES: Final = 12  # of one logit: itself, its float32 copy, and its gradient


@dataclass(frozen=True)
class Plan:
    parameters: int
    nodes: int  # that the numbers below are for
    update_bytes: int  # one encoded vector
    round_bytes: int  # that a node sends in a round with so many nodes, and receives
    round_bytes_many: int  # the same with ever more nodes
    exchange: str  # of so many nodes
    uploads: dict[str, dict[int, int]]  # by codec and nodes: bytes that a node sends in a round
    round_seconds_min: float  # what the cap on uploads wants; 0 without one
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
    leftovers = LEFTOVER_BYTES * parameters // nodes if packing.down.sparse else 0
    kept = MOMENTUM_BYTES * parameters if outer_of(spec.update).keeps_momentum else 0
    kinds = {name: packing_of(spec.update.model_copy(update={"codec": name, "mean": "auto"})) for name in NAMES}
    uploads = {name: {many: kind.sent_bytes(parameters, many) for many in GROUPS} for name, kind in kinds.items()}
    if spec.run.rounds:
        planned = spec.rounds.steps_before(spec.run.rounds) * batch * context * spec.run.min_nodes
    return Plan(
        parameters=parameters,
        nodes=nodes,
        update_bytes=packing.up.encoded_bytes(parameters),
        round_bytes=packing.sent_bytes(parameters, nodes),
        round_bytes_many=packing.up.encoded_bytes(parameters) + packing.down.encoded_bytes(parameters),
        exchange=packing.exchange([Role.PEER] * nodes).value,
        uploads=uploads,
        round_seconds_min=round_seconds(spec, parameters, nodes),
        sequences_first=spec.rounds.steps(0) * batch,
        sequences_last=spec.rounds.steps(max(0, spec.run.rounds - 1) if spec.run.rounds else 1 << 40) * batch,
        tokens_available=sequences * context,
        tokens_planned=planned,
        passes=None if planned is None or not sequences else planned / (sequences * context),
        memory_trainer_bytes=TRAINER_BYTES * parameters + LOGIT_BYTES * vocabulary * context,
        memory_helpers_bytes=HELPER_BYTES * parameters + kept + HELPERS_BYTES + leftovers,
    )
