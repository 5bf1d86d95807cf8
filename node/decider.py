"""The decider: both pure machines of a node and the queue of events before them. Carries nothing out itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from node.core import rounds, session
from node.core.rounds import Event as RoundsEvent
from node.core.rounds import Rounds

Event = RoundsEvent | session.Event
Effect = rounds.Effect | session.Effect

log = structlog.get_logger()


class Decider:
    """One event at a time; the effects of one are carried out, in order, before the next is looked at."""

    def __init__(self, rules: rounds.Rules, carry_out: Callable[[Effect], None], *, helper: bool = False) -> None:
        self.rules = rules
        self.session = session.Session(helper=helper)
        self.changed = asyncio.Event()  # another activity than the last heartbeat said
        self._rounds: Rounds | None = None
        self._carry_out = carry_out
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()

    @property
    def begun(self) -> bool:
        """Whether a state has been loaded, so that there is a round to be in."""
        return self._rounds is not None

    @property
    def rounds(self) -> Rounds:
        assert self._rounds is not None, "no state has been loaded"
        return self._rounds

    def begin(self, state: Rounds) -> None:
        self._rounds = state

    def post(self, event: Event) -> None:
        self._inbox.put_nowait(event)

    async def run(self) -> None:
        while True:
            event = await self._inbox.get()
            if isinstance(event, session.Event):
                self._step_session(event)
            else:
                self.step(event)

    def step(self, event: RoundsEvent) -> None:
        """At once, before what is in the queue: for whoever holds the lock that the event must be seen under."""
        if self._rounds is None:
            return
        before = self._rounds
        self._rounds, effects = rounds.step(before, event, time.monotonic(), self.rules)
        if self._rounds.phase is not before.phase:
            phase, ballot = self._rounds.phase.value, self._rounds.ballot
            log.debug("round", round=self._rounds.head.round, phase=phase, ballot=ballot)
        if self._rounds.attempts_failed != before.attempts_failed:
            log.warning("attempt failed", round=self._rounds.head.round, why=self._rounds.last_failure)
        for effect in effects:
            self._carry_out(effect)

    def _step_session(self, event: session.Event) -> None:
        if isinstance(event, session.PartDied):
            log.warning("a child process ended", part=event.part.value, why=event.why)
        before = self.session
        self.session, effects = session.step(before, event, time.monotonic())
        activity = session.activity(self.session)
        if activity is not session.activity(before):
            log.info(activity.value, why=session.reason(self.session, time.monotonic()))
            self.changed.set()
        for effect in effects:
            self._carry_out(effect)
        votes, trains = self.session.votes, self.session.trains
        if (votes, trains) != (before.votes, before.trains):
            self.post(rounds.ActivityChanged(votes, trains))
