"""Two rounds of four members, one of whom is the fuzzer's: it says anything, and signs it. The others are honest.

What the honest ones say was recorded, so the liar can quote it, and cannot change it: the edges check every signature
before the machine hears of a message."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

from node.core import rounds
from protocol import canonical
from protocol.errors import Refused
from protocol.log import record_hash
from protocol.messages import Begin, Message, Propose, Ready, Vote
from protocol.types import Digest, LogEntry, NodeId, Roster
from tests.core import test_rounds as honest

KINDS = {kind.__name__: kind for kind in get_args(Message)}
MEMBERS = (honest.A, honest.B, honest.C, honest.D)
LIAR = honest.B
HEARD_MAX = 80  # messages in one input: two rounds take half of that
SECONDS = 0.25  # between two of them


class Player(honest.Node):
    """A member whose edges do at once whatever it orders."""

    def __init__(self, me: NodeId) -> None:
        super().__init__(*MEMBERS, me=me)
        self.said: list[tuple[NodeId, Message]] = []

    def live(self, *events: rounds.Event) -> None:
        waiting = list(events)
        while waiting:
            self.see(waiting.pop(0))
            for effect in self.effects:
                match effect:
                    case rounds.Send():
                        self.said += [(to, effect.message) for to in effect.to if to != self.rules.me]
                    case _ if (answer := self._done(effect)) is not None:
                        waiting.append(answer)

    def _done(self, effect: rounds.Effect) -> rounds.Event | None:
        match effect:
            case rounds.TakeSnapshot():
                start = 1000 * effect.round + 100 * MEMBERS.index(self.rules.me)
                return honest.snapshot(honest.data(start, start + honest.STEPS))
            case rounds.Average(begin=begin):
                nodes = [signed.ready.sender for signed in begin.readies]
                parts = [honest.part_of(index, nodes, tuple(nodes)) for index in range(len(nodes))]
                mine = next((part for part in parts if part.reducer == self.rules.me), None)
                return rounds.Averaged(begin.ballot, mine, {part.index: part.digest for part in parts})
            case rounds.FetchParts(parts=parts):
                return rounds.PartsArrived(frozenset(part.digest for part in parts))
            case rounds.Fold(entry=entry):
                return rounds.Folded(entry.record.round, Digest(f"{entry.record.round + 2:064x}"))
        return None


@dataclass(frozen=True)
class Recorded:
    heard: Mapping[NodeId, tuple[Message, ...]]  # by each of them, in order
    promises: frozenset[str]  # as a Begin quotes them
    signed: frozenset[tuple[NodeId, Digest]]  # who signed which record, as a proposal or a vote
    brought: frozenset[str]


@cache
def recorded() -> Recorded:
    players = {me: Player(me) for me in MEMBERS}
    heard: dict[NodeId, list[Message]] = {me: [] for me in MEMBERS}
    while min(player.state.head.round for player in players.values()) < 2:
        for player in players.values():
            player.now += SECONDS
            assert player.now < 100, "honest members decide two rounds"
            steps = player.state.steps + 1 if player.state.contribution is None else 0
            player.live(rounds.Progressed(steps), rounds.Ticked())
        while any(player.said for player in players.values()):
            for player in players.values():
                said, player.said = player.said, []
                for to, message in said:
                    heard[to].append(message)
                    players[to].live(rounds.Received(message, "s"))
    messages = [message for each in heard.values() for message in each]
    quoted = (ready for message in messages if isinstance(message, Begin) for ready in message.readies)
    return Recorded(
        {me: tuple(each) for me, each in heard.items()},
        frozenset(map(str, quoted)),
        frozenset(
            (each.sender, record_hash(each.record) if isinstance(each, Propose) else each.record)
            for each in messages
            if isinstance(each, Propose | Vote)
        ),
        frozenset(str(each.contribution) for each in messages if isinstance(each, Ready)),
    )


def play(me: NodeId, script: Sequence[Any]) -> Player:
    """A member hears this: a number is one of the honest messages to it, a name and a body are the liar's own."""
    player, known = Player(me), recorded()

    def signed(node: NodeId, record: Digest) -> bool:
        return node in (me, LIAR) or (node, record) in known.signed

    def certified(entry: LogEntry, roster: Roster) -> bool:
        record, signers = record_hash(entry.record), {each.node for each in entry.certificate.signatures}
        return len(signers) >= roster.quorum and all(roster.member(node) and signed(node, record) for node in signers)

    player.rules = replace(
        player.rules,
        vote_is_valid=lambda node, body, signature: signed(node, body.record),
        proposal_is_valid=lambda node, body, signature: signed(node, body.record),
        is_brought=lambda head, each: each.node in (me, LIAR) or str(each) in known.brought,
        entry_is_certified=certified,
    )
    for each in script[:HEARD_MAX]:
        player.now += SECONDS
        player.live(rounds.Progressed(player.state.steps + 1), rounds.Ticked())
        if (message := _heard(me, each)) is not None:
            player.live(rounds.Received(message, "s"))
    return player


def _heard(me: NodeId, each: Any) -> Message | None:
    heard = recorded().heard[me]
    match each:
        case int() if 0 <= each < len(heard):
            return heard[each]
        case [str(name), dict(body)] if name in KINDS:
            try:
                message: Message = canonical.from_bytes(KINDS[name], canonical.to_bytes({**body, "sender": LIAR}))
            except (Refused, OverflowError, UnicodeEncodeError, AssertionError):  # a value without canonical bytes
                return None
            quoted = message.readies if isinstance(message, Begin) else ()
            return (
                message
                if all(each.ready.sender == LIAR or str(each) in recorded().promises for each in quoted)
                else None
            )
    return None


def scripts(me: NodeId) -> tuple[list[Any], ...]:
    """What really happened to this member, with the liar's part spelled out; and the same said before anything else."""
    heard = recorded().heard[me]
    spelled = [
        [type(m).__name__, json.loads(canonical.to_bytes(m))] if m.sender == LIAR else n for n, m in enumerate(heard)
    ]
    return spelled, [each for each in spelled if not isinstance(each, int)]
