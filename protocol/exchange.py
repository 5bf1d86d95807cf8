"""How the members of a group hand each other what they trained: which exchange, which codecs, how many bytes.

In an all-reduce each peer averages its slice of everybody's vector and sends the mean to all. In an all-gather everybody
sends its whole contribution to all, and each averages by itself: nobody's average has to be believed, and a sparse
contribution is never made dense. Of n members each sends (n - 1) / n * (up + down) bits per parameter in the one and
(n - 1) * up in the other, so the all-gather is no dearer while n * up <= up + down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.codec import Codec, codec
from protocol.log import spans
from protocol.robust import Rule
from protocol.runspec import RunSpec, UpdateSection
from protocol.types import Exchange, Role


@dataclass(frozen=True)
class Packing:
    """The codecs of a run: `up` for what members bring, `down` for the means of an all-reduce; and how those are taken."""

    up: Codec
    down: Codec
    rule: Rule = Rule.MEAN

    def exchange(self, roles: Sequence[Role]) -> Exchange:
        """For a group of members in these roles: an all-gather of what is sparse, unless that sends more.

        A client cannot be called, so it is reduced with."""
        reachable = Role.CLIENT not in roles
        no_dearer = self.up.sparse and len(roles) * self.up.bits <= self.up.bits + self.down.bits
        return Exchange.ALL_GATHER if reachable and no_dearer else Exchange.ALL_REDUCE

    def of(self, exchange: Exchange) -> Codec:
        """The codec of a record's parts."""
        return self.up if exchange is Exchange.ALL_GATHER else self.down

    def sent_bytes(self, parameters: int, members: int) -> int:
        """What one of so many peers uploads in a round, without what the transport adds."""
        up, down = self.up.encoded_bytes(parameters), self.down.encoded_bytes(parameters)
        if self.exchange([Role.PEER] * members) is Exchange.ALL_GATHER:
            return (members - 1) * up
        return (members - 1) * (up + down) // members

    def update_bytes(self, parameters: int, members: int) -> int:
        """All parts of one record: what a round costs whoever catches up with it."""
        exchange = self.exchange([Role.PEER] * members)
        copies = members if exchange is Exchange.ALL_GATHER else 1
        return copies * self.of(exchange).encoded_bytes(parameters)


def packing_of(update: UpdateSection) -> Packing:
    """The codecs and the rule that a run file names."""
    return Packing(codec(update.codec), codec(update.mean_codec), Rule(update.robust))


def round_seconds(spec: RunSpec, parameters: int, members: int) -> float:
    """The shortest round in which one of so many peers stays below the run's cap on uploads; 0 without a cap."""
    cap = spec.rounds.upload_megabytes_per_hour * 1e6 / 3600
    return packing_of(spec.update).sent_bytes(parameters, members) / cap if cap else 0.0


def layout(exchange: Exchange, parameters: int, roles: Sequence[Role]) -> tuple[tuple[int, int], ...]:
    """Which values the part of each member holds: its slice, or all of them."""
    if exchange is Exchange.ALL_GATHER:
        return ((0, parameters),) * len(roles)
    return spans(parameters, roles)
