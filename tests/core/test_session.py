"""What a node does next, each rule as a short list of events."""

from __future__ import annotations

import pytest

from node.core import session
from node.core.session import (
    AcquireLeases,
    Activity,
    CaughtUp,
    DataUsed,
    End,
    FinishAsked,
    LeasesArrived,
    LinkLost,
    LinkOpened,
    ObstacleChanged,
    Part,
    PartDied,
    PartReady,
    PauseAsked,
    Release,
    Restart,
    ResumeAsked,
    RoundSettled,
    RunEnded,
    Session,
    SetTraining,
    TimePassed,
    TrainerReleased,
    activity,
    reason,
)

UP = (LinkOpened(), CaughtUp(), PartReady(Part.ENGINE), PartReady(Part.TRAINER))


def after(*events, state=None, at=0.0):
    """The state after these events, and all effects on the way."""
    state, done = state or Session(sequences_wanted=4), []
    for event in events:
        state, effects = session.step(state, event, at)
        done += effects
    return state, done


def training():
    return after(*UP, LeasesArrived(8))[0]


def test_a_node_trains_once_its_model_and_its_trainer_are_ready():
    assert SetTraining(True) not in after(*UP[:3])[1]
    assert SetTraining(True) in after(*UP)[1]


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_node_that_lacks_a_part_brings_nothing_to_rounds(missing):
    state = after(*UP[:missing], *UP[missing + 1 :])[0]
    assert not (state.votes and state.trains)
    assert after(*UP)[0].votes and after(*UP)[0].trains


def test_data_is_asked_for_once_at_a_time():
    state, effects = after(*UP)
    assert effects.count(AcquireLeases(8)) == 1
    assert after(TimePassed(), state=state, at=9.0)[1] == []


def test_after_a_refusal_data_is_asked_for_later():
    state, _ = after(*UP, LeasesArrived(0))
    assert after(TimePassed(), state=state, at=1.0)[1] == []
    assert after(TimePassed(), state=state, at=session.LEASE_ASK_SECONDS)[1] == [AcquireLeases(8)]


def test_data_is_asked_for_before_it_runs_out():
    assert after(DataUsed(4, 4), state=training())[1] == []
    assert after(DataUsed(3, 4), state=training())[1] == [AcquireLeases(5)]


def test_training_goes_on_while_the_coordinator_is_away():
    state, effects = after(LinkLost("no route"), DataUsed(1, 4), state=training())
    assert effects == []
    assert activity(state) is Activity.TRAINING
    assert "no route" in reason(state, 0.0)
    assert after(LinkOpened(), state=state)[1] == [AcquireLeases(7)]


def test_a_pause_stops_training_and_leaves_only_the_vote():
    state, effects = after(PauseAsked(None), state=training())
    assert effects == [SetTraining(False)]
    assert state.votes and not state.trains
    assert activity(state) is Activity.PAUSED


def test_a_pause_ends_when_its_time_is_up_or_when_asked():
    state, _ = after(PauseAsked(60.0), state=training())
    assert after(TimePassed(), state=state, at=59.0)[1] == []
    assert after(TimePassed(), state=state, at=60.0)[1] == [SetTraining(True)]
    assert after(ResumeAsked(), state=state)[1] == [SetTraining(True)]


def test_a_finishing_node_stops_training_and_ends_when_its_work_is_in_a_round():
    state, effects = after(FinishAsked(), state=training())
    assert effects == [SetTraining(False)]
    assert state.trains
    assert after(RoundSettled(pending=True), state=state)[1] == []
    assert after(RoundSettled(pending=False), state=state)[1] == [End()]


def test_a_paused_node_that_is_to_finish_brings_its_work_once_more():
    state, _ = after(PauseAsked(None), FinishAsked(), state=training())
    assert state.trains
    assert activity(state) is Activity.FINISHING


def test_a_settled_round_ends_nothing_unless_asked():
    assert after(RoundSettled(pending=False), state=training())[1] == []


def test_the_end_of_the_run_is_the_end_of_the_node():
    assert End() in after(RunEnded(), state=training())[1]


def test_a_dead_child_is_started_again_after_a_while():
    state, effects = after(PartDied(Part.TRAINER, "killed"), state=training())
    assert (effects, state.sequences_left, state.trains) == ([], 0, False)
    assert after(TimePassed(), state=state, at=0.9)[1] == []
    state, effects = after(TimePassed(), state=state, at=1.0)
    assert effects == [Restart(Part.TRAINER)]
    assert after(TimePassed(), state=state, at=2.0)[1] == []
    assert SetTraining(True) in after(PartReady(Part.TRAINER), state=state)[1]


def dies(part, state, at=0.0):
    deaths = [PartDied(part, "an illegal memory access")] * session.RESTARTS_MAX
    return after(*deaths, state=state, at=at)


@pytest.mark.parametrize(("part", "state"), [(Part.ENGINE, after(*UP[:2])[0]), (Part.TRAINER, after(*UP[:3])[0])])
def test_a_child_that_keeps_dying_ends_the_node_with_the_reason_if_it_can_do_nothing_without(part, state):
    _, effects = dies(part, state)
    assert "an illegal memory access" in effects[-1].failed


def test_an_engine_that_has_worked_is_started_again_however_often_strangers_end_it():
    state, effects = after(*[PartDied(Part.ENGINE, "x")] * 3 * session.RESTARTS_MAX, state=training())
    assert not effects and state.trains and "x" in state.trouble
    state, _ = after(PartDied(Part.TRAINER, "x"), state=state)
    assert not state.rests, "each part is counted for itself"
    assert Restart(Part.ENGINE) in after(TimePassed(), state=state, at=session.RESTART_SECONDS[-1])[1]


def test_a_trainer_that_has_worked_and_keeps_dying_makes_the_node_rest_with_the_reason_and_try_again_later():
    state, effects = dies(Part.TRAINER, training())
    assert not effects and state.votes and not state.trains and state.sequences_left == 0
    assert activity(state) is Activity.PAUSED
    assert "an illegal memory access; tries again in 60 min, or with barnraise resume" in reason(state, 0.0)
    assert after(TimePassed(), state=state, at=session.RECOVERY_SECONDS - 1)[1] == []
    back, effects = after(TimePassed(), state=state, at=session.RECOVERY_SECONDS)
    assert effects == [Restart(Part.TRAINER)] and not back.rests
    assert after(TimePassed(), state=back, at=session.RECOVERY_SECONDS + 1)[1] == []
    again, effects = after(PartDied(Part.TRAINER, "x"), state=back, at=session.RECOVERY_SECONDS + 1)
    assert not again.rests, "five more deaths before it rests again"
    back, effects = after(ResumeAsked(), state=state, at=60.0)
    assert effects == [Restart(Part.TRAINER)] and not back.rests


def test_who_pauses_a_node_whose_trainer_is_broken_is_obeyed_when_the_device_is_well_again():
    state, _ = dies(Part.TRAINER, training())
    state, _ = after(PauseAsked(None), state=state)
    state, effects = after(TimePassed(), state=state, at=session.RECOVERY_SECONDS)
    assert not effects and state.rests and reason(state, 0.0).startswith("paused by you")
    assert after(ResumeAsked(), state=state, at=session.RECOVERY_SECONDS)[1] == [Restart(Part.TRAINER)]


def test_old_deaths_are_forgiven():
    state = training()
    for n in range(2 * session.RESTARTS_MAX):
        state, _ = after(PartDied(Part.TRAINER, "x"), state=state, at=n * session.RESTART_WINDOW_SECONDS)
        assert not state.rests


@pytest.mark.parametrize(
    ("events", "word"),
    [
        ((), Activity.JOINING),
        (UP[:2], Activity.SYNCING),
        (UP, Activity.WAITING),
        ((*UP, LeasesArrived(8)), Activity.TRAINING),
        ((*UP, FinishAsked()), Activity.FINISHING),
    ],
)
def test_one_word_and_one_line_say_what_a_node_does(events, word):
    state, _ = after(*events)
    assert activity(state) is word
    assert reason(state, 0.0)


# the owner's policy


def test_an_obstacle_stops_training_with_its_reason_and_goes_by_itself():
    state, effects = after(ObstacleChanged("this machine runs on its battery"), state=training())
    assert effects == [SetTraining(False)] and state.votes and not state.trains
    assert activity(state) is Activity.PAUSED
    assert reason(state, 0.0) == "this machine runs on its battery; barnraise resume trains all the same"
    state, effects = after(ObstacleChanged(""), state=state)
    assert effects == [SetTraining(True)] and state.trains and activity(state) is Activity.TRAINING


def test_a_pause_by_hand_outlasts_an_obstacle_that_goes():
    state = after(ObstacleChanged("outside of your hours"), PauseAsked(None), ObstacleChanged(""), state=training())[0]
    assert not state.trains and reason(state, 0.0).startswith("paused by you")


def test_the_owners_word_is_above_the_policy_until_that_says_something_new():
    state, effects = after(ObstacleChanged("outside of your hours"), ResumeAsked(), state=training())
    assert effects == [SetTraining(False), SetTraining(True)] and state.trains
    assert not after(ObstacleChanged("this machine runs on its battery"), state=state)[0].trains


def test_a_long_pause_gives_the_device_back_and_its_end_starts_the_trainer_again():
    state, effects = after(PauseAsked(None), TimePassed(), state=training(), at=10.0)
    late = 10.0 + session.RELEASE_SECONDS
    assert after(TimePassed(), state=state, at=late - 1)[1] == []
    state, effects = after(TimePassed(), TimePassed(), state=state, at=late)
    assert effects == [Release()], "asked for once"
    again = after(TimePassed(), state=state, at=late + session.RELEASE_AGAIN_SECONDS)
    assert again[1] == [Release()], "a round stood in its way"
    state, effects = after(TrainerReleased(), TimePassed(), state=state, at=late + 60)
    assert effects == [] and not state.trainer_ready and activity(state) is Activity.PAUSED and state.votes
    state, effects = after(ResumeAsked(), TimePassed(), state=state, at=late + 70)
    assert effects == [Restart(Part.TRAINER)], "once"
    assert activity(state) is Activity.SYNCING
    assert SetTraining(True) in after(PartReady(Part.TRAINER), state=state, at=late + 80)[1]


def test_a_short_pause_keeps_the_trainer():
    state = after(PauseAsked(None), state=training(), at=0.0)[0]
    state = after(ResumeAsked(), state=state, at=100.0)[0]
    state, effects = after(PauseAsked(None), TimePassed(), state=state, at=session.RELEASE_SECONDS + 50)
    assert Release() not in effects


def helping(*events, at=0.0):
    up = (LinkOpened(), CaughtUp(), PartReady(Part.ENGINE))
    return after(*up, *events, state=Session(helper=True, sequences_wanted=4), at=at)


def test_a_helper_votes_without_a_trainer_and_asks_for_no_data():
    state, effects = helping(DataUsed(0, 4), TimePassed(), at=10 * session.RELEASE_SECONDS)
    assert effects == [] and state.votes and not state.trains
    assert activity(state) is Activity.HELPING and reason(state, 0.0).startswith("averages for others")


@pytest.mark.parametrize("event", [ResumeAsked(), PauseAsked(None), ObstacleChanged("outside of your hours")])
def test_nothing_that_speaks_for_or_against_training_concerns_a_helper(event):
    state, effects = helping(event, TimePassed(), at=10 * session.RELEASE_SECONDS)
    assert (effects, activity(state), state.trains) == ([], Activity.HELPING, False)


def test_a_helper_without_room_for_what_it_averages_says_so_until_there_is_some():
    state, _ = helping(ObstacleChanged("no room is left"))
    assert activity(state) is Activity.HELPING and reason(state, 0.0) == "cannot average for others: no room is left"
    assert reason(after(ObstacleChanged(""), state=state)[0], 0.0) == "averages for others, and trains nothing"


def test_a_helper_waits_for_its_model_and_the_swarm_only():
    state = after(LinkOpened(), state=Session(helper=True))[0]
    assert activity(state) is Activity.SYNCING and reason(state, 0.0) == "preparing the model and the swarm"
