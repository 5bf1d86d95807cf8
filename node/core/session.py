"""What a node does next and why: when it trains, takes part in rounds, asks for data, and ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

LEASE_ASK_SECONDS = 2.0  # between two requests for data when none was granted
RELEASE_SECONDS = 120.0  # of a pause: then the trainer ends, and the device has its memory back
RELEASE_AGAIN_SECONDS = 10.0  # a round was about to take what it made
RESTART_SECONDS = (1.0, 5.0, 30.0)  # waits before a child process is started again
RESTARTS_MAX = 5  # in the window below; then the node ends and says why, or rests where a trainer fails that has worked
RESTART_WINDOW_SECONDS = 600.0
RECOVERY_SECONDS = 3600.0  # of such a rest: a device may be reset meanwhile, or cool down


class Activity(Enum):
    """For the status line, the heartbeat and the researcher's page."""

    JOINING = "joining"
    SYNCING = "syncing"
    TRAINING = "training"
    WAITING = "waiting"
    PAUSED = "paused"
    FINISHING = "finishing"
    HELPING = "averaging for others"


class Part(Enum):
    """A child process of the daemon."""

    TRAINER = "trainer"
    ENGINE = "engine"


@dataclass(frozen=True)
class Session:
    helper: bool = False  # never trains: it votes, and averages for those who do
    linked: bool = False
    synced: bool = False
    trainer_ready: bool = False
    engine_ready: bool = False
    paused: bool = False
    paused_until: float | None = None
    obstacle: str = ""  # what speaks, by the owner's own policy, against training; or, for a helper, against averaging
    idle_since: float | None = None
    release_at: float = 0.0  # not again before
    released: bool = False  # the trainer has ended because of a pause
    worked: frozenset[Part] = frozenset()  # has been ready once: it is not this machine that cannot run it
    broken: str = ""  # why it is not started again before this time
    broken_until: float = 0.0
    finishing: bool = False
    run_over: bool = False
    sequences_left: int = 0  # leased, not yet trained on
    sequences_wanted: int = 1  # keep at least this many ahead
    lease_pending: bool = False
    lease_at: float = 0.0  # not again before
    training: bool = False  # what the trainer was last told
    crashes: tuple[tuple[Part, float], ...] = ()
    restart_at: tuple[tuple[Part, float], ...] = ()
    trouble: str = ""  # the newest thing that went wrong, for people

    @property
    def votes(self) -> bool:
        """Whether this node may promise, reduce and vote; while it is paused it does so for those who wait for it."""
        return self.synced and self.engine_ready

    @property
    def trains(self) -> bool:
        """Whether it brings work to rounds."""
        return self.trainer_ready and self.allowed

    @property
    def allowed(self) -> bool:
        """Whether the owner lets it train."""
        return not self.helper and not self.rests

    @property
    def rests(self) -> bool:
        """Whether training rests; a helper has none that could."""
        return not self.helper and (self.paused or bool(self.obstacle) or bool(self.broken))

    @property
    def lacks(self) -> tuple[str, ...]:
        """What is not ready yet, for people."""
        needed = (("the model", self.synced), ("the trainer", self.trainer_ready or self.helper))
        return tuple(word for word, ready in (*needed, ("the swarm", self.engine_ready)) if not ready)


# events


@dataclass(frozen=True)
class LinkOpened:
    pass


@dataclass(frozen=True)
class LinkLost:
    why: str


@dataclass(frozen=True)
class CaughtUp:
    """The replica is folded up to the newest record known."""


@dataclass(frozen=True)
class PartReady:
    part: Part


@dataclass(frozen=True)
class PartDied:
    part: Part
    why: str


@dataclass(frozen=True)
class PartStopped:
    """We ended it ourselves, and start it again when its time has come."""

    part: Part


@dataclass(frozen=True)
class LeasesArrived:
    sequences: int


@dataclass(frozen=True)
class DataUsed:
    sequences_left: int
    sequences_wanted: int


@dataclass(frozen=True)
class PauseAsked:
    until: float | None


@dataclass(frozen=True)
class ResumeAsked:
    pass


@dataclass(frozen=True)
class ObstacleChanged:
    """What the owner's policy says, when it says something new."""

    obstacle: str


@dataclass(frozen=True)
class TrainerReleased:
    """It has ended; its work is kept, and the device free."""


@dataclass(frozen=True)
class FinishAsked:
    pass


@dataclass(frozen=True)
class RunEnded:
    pass


@dataclass(frozen=True)
class RoundSettled:
    """A round was folded; `pending` says whether trained work still waits for a round."""

    pending: bool


@dataclass(frozen=True)
class TimePassed:
    pass


Event = (
    LinkOpened
    | LinkLost
    | CaughtUp
    | PartReady
    | PartDied
    | PartStopped
    | LeasesArrived
    | DataUsed
    | PauseAsked
    | ResumeAsked
    | ObstacleChanged
    | TrainerReleased
    | FinishAsked
    | RunEnded
    | RoundSettled
    | TimePassed
)


# effects


@dataclass(frozen=True)
class SetTraining:
    on: bool


@dataclass(frozen=True)
class AcquireLeases:
    """Ends as LeasesArrived, with 0 when none could be had."""

    sequences: int


@dataclass(frozen=True)
class Restart:
    part: Part


@dataclass(frozen=True)
class Release:
    """End the trainer for the time of a pause. Ends as TrainerReleased, or as nothing if that cannot be now."""


@dataclass(frozen=True)
class End:
    """Stop the daemon; `failed` explains a failure, and is empty for a wished end."""

    failed: str = ""


Effect = SetTraining | AcquireLeases | Restart | Release | End
Outcome = tuple[Session, tuple[Effect, ...]]


def step(state: Session, event: Event, now: float) -> Outcome:
    """Take one event; return the new state and what must be done."""
    state, effects = _apply(state, event, now)
    state, more = _settle(state, now)
    return state, effects + more


def _apply(state: Session, event: Event, now: float) -> Outcome:
    match event:
        case LinkOpened():
            return replace(state, linked=True, lease_pending=False), ()
        case LinkLost(why):
            return replace(state, linked=False, lease_pending=False, trouble=why), ()
        case CaughtUp():
            return replace(state, synced=True), ()
        case PartReady(part):
            return replace(_part(state, part, True), worked=state.worked | {part}), ()
        case PartDied(part, why):
            return _died(state, part, why, now)
        case PartStopped(part):
            return _without(state, part), ()
        case LeasesArrived(sequences):
            wait = 0.0 if sequences else LEASE_ASK_SECONDS
            left = state.sequences_left + sequences
            return replace(state, lease_pending=False, sequences_left=left, lease_at=now + wait), ()
        case DataUsed(left, wanted):
            return replace(state, sequences_left=left, sequences_wanted=wanted), ()
        case PauseAsked(until):
            return replace(state, paused=True, paused_until=until), ()
        case ResumeAsked():  # the owner's word is above the owner's policy, until that says something new
            return replace(state, paused=False, paused_until=None, obstacle="", broken=""), ()
        case ObstacleChanged(obstacle):
            return replace(state, obstacle=obstacle), ()
        case TrainerReleased():
            return replace(_without(state, Part.TRAINER), released=True), ()
        case FinishAsked():
            return replace(state, finishing=True, paused=False, paused_until=None), ()  # a round needs it once more
        case RunEnded():
            return replace(state, run_over=True), (End(),)
        case RoundSettled(pending):
            return state, (End(),) if state.finishing and not pending else ()
        case TimePassed():
            if state.paused and state.paused_until is not None and now >= state.paused_until:
                state = replace(state, paused=False, paused_until=None)
            return replace(state, broken="" if now >= state.broken_until else state.broken), ()


def _part(state: Session, part: Part, ready: bool) -> Session:
    return replace(state, trainer_ready=ready) if part is Part.TRAINER else replace(state, engine_ready=ready)


def _without(state: Session, part: Part) -> Session:
    state = _part(state, part, False)
    return replace(state, training=False, sequences_left=0) if part is Part.TRAINER else state


def _died(state: Session, part: Part, why: str, now: float) -> Outcome:
    crashes = (*(each for each in state.crashes if now - each[1] < RESTART_WINDOW_SECONDS), (part, now))
    state = replace(_without(state, part), crashes=crashes, trouble=why)
    deaths = sum(dead is part for dead, _ in crashes)
    told = f"the {part.value} ended {deaths} times in ten minutes; the last time: {why}"
    if deaths >= RESTARTS_MAX and part not in state.worked:
        return state, (End(told),)
    if deaths >= RESTARTS_MAX and part is Part.TRAINER:  # an engine goes on: strangers can end it, by a flood
        waiting = tuple(each for each in state.restart_at if each[0] is not part)
        until = now + RECOVERY_SECONDS
        return replace(state, crashes=(), restart_at=waiting, broken=told, broken_until=until, released=True), ()
    wait = RESTART_SECONDS[min(deaths, len(RESTART_SECONDS)) - 1]
    return replace(state, restart_at=(*state.restart_at, (part, now + wait))), ()


def _settle(state: Session, now: float) -> Outcome:
    """Whatever follows from the state, whichever event led to it."""
    effects: list[Effect] = [Restart(part) for part, at in state.restart_at if now >= at]
    if effects:
        state = replace(state, restart_at=tuple((part, at) for part, at in state.restart_at if now < at))
    state, more = _rest(state, now)
    effects += more
    train = state.trainer_ready and state.synced and state.allowed and not state.finishing
    if train != state.training and state.trainer_ready:
        state = replace(state, training=train)
        effects.append(SetTraining(train))
    hungry = state.sequences_left < state.sequences_wanted
    if state.linked and train and hungry and not state.lease_pending and now >= state.lease_at:
        state = replace(state, lease_pending=True)
        effects.append(AcquireLeases(2 * state.sequences_wanted - state.sequences_left))
    return state, tuple(effects)


def _rest(state: Session, now: float) -> Outcome:
    """A short pause keeps the trainer, so that it goes on at once; a long one gives the device back."""
    if state.allowed:
        again = state.released and not state.finishing
        rested = replace(state, idle_since=None, released=state.released and not again)
        return rested, (Restart(Part.TRAINER),) if again else ()
    state = replace(state, idle_since=now if state.idle_since is None else state.idle_since)
    assert state.idle_since is not None
    due = now - state.idle_since >= RELEASE_SECONDS and now >= state.release_at
    if not due or not state.trainer_ready or state.finishing:
        return state, ()
    return replace(state, release_at=now + RELEASE_AGAIN_SECONDS), (Release(),)


def activity(state: Session) -> Activity:
    if state.rests and not state.finishing:
        return Activity.PAUSED
    if state.finishing:
        return Activity.FINISHING
    if not state.linked and not state.synced:
        return Activity.JOINING
    if state.lacks:
        return Activity.SYNCING
    if state.helper:
        return Activity.HELPING
    if state.sequences_left == 0:
        return Activity.WAITING
    return Activity.TRAINING


def reason(state: Session, now: float) -> str:
    """One line that says why the node is not training, or that it is."""
    match activity(state):
        case Activity.PAUSED:
            if state.paused and state.paused_until is None:
                return "paused by you; barnraise resume goes on"
            if state.paused and state.paused_until is not None:
                return f"paused by you for another {_minutes(state.paused_until - now)}"
            if state.broken:
                return f"{state.broken}; tries again in {_minutes(state.broken_until - now)}, or with barnraise resume"
            return f"{state.obstacle}; barnraise resume trains all the same"
        case Activity.FINISHING:
            return "finishing this round, then stopping"
        case Activity.JOINING:
            return state.trouble or "talking to the coordinator"
        case Activity.SYNCING:
            return f"preparing {' and '.join(state.lacks)}{f' ({state.trouble})' if state.trouble else ''}"
        case Activity.HELPING:
            told = "averages for others, and trains nothing"
            if state.obstacle:
                told = f"cannot average for others: {state.obstacle}"
            return told if state.linked else f"{told}; the coordinator is away ({state.trouble})"
        case Activity.WAITING:
            if not state.linked:
                return f"no data left and the coordinator is away ({state.trouble})"
            return "waiting for data from the coordinator"
        case Activity.TRAINING:
            return "training" if state.linked else f"training; the coordinator is away ({state.trouble})"


def _minutes(seconds: float) -> str:
    return f"{max(0, round(seconds / 60))} min"
