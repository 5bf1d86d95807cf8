"""What people and scripts see of a node: one flat view, made of what the machines know and what was counted."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from node.core import session
from node.core.rounds import Rounds, Rules, majority_awaited
from node.core.session import Activity, Session
from node.training import Stepped, Trainer
from protocol.types import NodeId, Roster

VERSION: Final = 1  # raised when a field changes its meaning
RECENT_ROUNDS: Final = 20
DIRECT, OUTBOUND_ONLY, NOBODY = "direct", "outbound-only", "nobody"  # of a run in which nobody can be called


@dataclass
class Tally:
    """What the daemon counts, for people only: nothing is decided by it."""

    started: float = field(default_factory=time.monotonic)
    stepped: Stepped | None = None
    losses: list[float] = field(default_factory=list)  # since the last heartbeat
    download: dict[str, Any] | None = None  # what is being fetched: what, done, size; of bytes their pace
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=RECENT_ROUNDS))
    credit_tokens: int = 0  # certified since this start
    sent: int = 0  # bytes to and from peers
    received: int = 0
    notice: str = ""
    nobody_callable: bool = False  # says the coordinator: no round can end
    clock: str = ""  # what is wrong with this machine's clock

    def trained(self, stepped: Stepped) -> None:
        """A report without a step in it says nothing about speed or loss."""
        if stepped.loss is not None:
            self.stepped = stepped
            self.losses.append(stepped.loss)

    def settled(self, round_number: int, *, tokens: int, accepted: bool, reduced: bool = False) -> None:
        self.credit_tokens += tokens if accepted else 0
        outcome = "accepted" if accepted else "averaged for others" if reduced else "not in it"
        self.recent.append({"round": round_number, "outcome": outcome, "tokens": tokens if accepted else 0})

    def mean_loss(self) -> float | None:
        """Of the steps since it was last asked for."""
        losses, self.losses = self.losses, []
        return sum(losses) / len(losses) if losses else None


def view(
    state: Session,
    rounds: Rounds | None,
    rules: Rules,
    *,
    run: str,
    name: str,
    trainer: Trainer | None,
    confinement: str,
    tally: Tally,
) -> dict[str, Any]:
    """The status as one JSON object; `null` where nothing is known yet."""
    now, stepped = time.monotonic(), tally.stepped
    shown: dict[str, Any] = {
        "version": VERSION,
        "run": run,
        "name": name,
        "node": rules.me[:8],
        "activity": session.activity(state).value,
        "reason": session.reason(state, now),
        "trains": not state.helper,
        "linked": state.linked,
        "credit_tokens": tally.credit_tokens,
        "sequences_left": state.sequences_left,
        "bytes_sent": tally.sent,
        "bytes_received": tally.received,
        "uptime_seconds": round(now - tally.started, 1),
        "download": tally.download,
        "recent": list(tally.recent),
        "trouble": tally.notice or tally.clock,
        "tokens_per_second": stepped.tokens_per_second if stepped else None,
        "loss": stepped.loss if stepped else None,
        "busy_share": trainer.busy_share if trainer else None,
        "device": trainer.started.device if trainer else None,
        "micro_batch": trainer.started.micro_batch if trainer else None,
        "sandbox": confinement,
    }
    if rounds is None:
        return shown
    awaited = majority_awaited(rounds, now)
    if awaited is not None and state.votes:
        heard, members = awaited
        shown["reason"] = f"{shown['reason']}; waiting for a majority: {heard} of {members} nodes answer"
    shown |= _rounds(rounds, rules)
    if tally.nobody_callable and shown["reach"] != DIRECT:
        shown["reach"] = NOBODY
    if state.helper:
        shown |= {"round_steps": None, "round_steps_goal": None}
    if session.activity(state) is Activity.HELPING and shown["reach"] in (OUTBOUND_ONLY, NOBODY):
        shown["reason"] = "is there to average for others, and none of them can call it"
    return shown


def _reach(roster: Roster | None, me: NodeId) -> str | None:
    """How this node and the others come together: what the coordinator found out when it called."""
    member = roster.member(me) if roster is not None else None
    if roster is None or member is None:
        return None
    if member.is_callable:
        return DIRECT
    return OUTBOUND_ONLY if any(other.is_callable for other in roster.members) else NOBODY


def _rounds(rounds: Rounds, rules: Rules) -> dict[str, Any]:
    roster = rounds.roster
    return {
        "round": rounds.head.round,
        "phase": rounds.phase.value,
        "head": {"round": rounds.head.round, "hash": rounds.head.hash, "state": rounds.digest},
        "epoch": max(rounds.rosters, default=None),
        "rostered": roster is not None and roster.member(rules.me) is not None,
        "peers": len(roster.members) - 1 if roster is not None else 0,
        "reach": _reach(roster, rules.me),
        "round_steps": rounds.steps,
        "round_steps_goal": rules.inner_steps(rounds.head.round),
        "attempts_failed": rounds.attempts_failed,
        "last_failure": rounds.last_failure,
    }
