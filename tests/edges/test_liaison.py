"""The liaison with a coordinator made of a few lines: in which order a node brings it what it has forgotten."""

from types import SimpleNamespace

import pytest

from node.core.rounds import Rounds
from node.decider import Decider
from node.journal import Journal
from node.liaison import Liaison
from node.link import News, Page
from node.status import Tally
from protocol.errors import Code, Refused
from protocol.limits import ROSTERS_RECALLED_MAX
from protocol.state import Consumed
from protocol.types import (
    Ballot,
    Certificate,
    Digest,
    Head,
    LogEntry,
    Record,
    Rollback,
    Roster,
    SignedRollback,
    SignedRoster,
)

HEAD = Head(5, Digest("55" * 32))


def roster(epoch):
    return SignedRoster(Roster("run", epoch, (), 0), "s")


def rollback(number):
    return SignedRollback(Rollback("run", number, Head(2, Digest("22" * 32)), HEAD, "", 0), "s")


def entry(number, epoch=0):
    record = Record("run", number, Digest("00" * 32), epoch, "ash", (), (), Digest("11" * 32))
    return LogEntry(record, Certificate(Digest("99" * 32), Ballot(epoch, 0), ()))


class Coordinator:
    """It says what it is told to; all that is brought is noted."""

    def __init__(self):
        self.news = {}
        self.calls = []

    async def heartbeat(self, beat, *, wait_seconds):
        said = {"head_round": beat.head.round, "epoch": beat.epoch, "branch": beat.branch}
        said |= {"roster": None, "wanted": (), "renewed": beat.lease_ids, "notice": "", "coordinator_ms": 0}
        said |= {"finished": False, "rollbacks": (), "silent_epoch": None}
        return News(**said | self.news)

    async def push_entry(self, brought, rosters=(), rollbacks=()):
        number = brought.record.round if brought is not None else None
        self.calls.append((number, tuple(each.roster.epoch for each in rosters), len(rollbacks)))
        return ()

    async def upload_part(self, digest, data):
        self.calls.append(digest)

    async def read_log(self, start):
        self.calls.append("read")
        return Page((), (), None, ())


class Stand:
    def __init__(self, folder, **state):
        self.coordinator = Coordinator()
        self.journal = Journal(folder / "journal")
        self.decider = Decider(SimpleNamespace(run="run"), lambda effect: None)
        fields = {"head": HEAD, "digest": Digest("11" * 32), "consumed": Consumed()}
        self.decider.begin(Rounds(**fields | state))
        self.lost = []
        self.liaison = Liaison(
            self.coordinator,
            SimpleNamespace(online=True, life=1),
            heartbeat_seconds=0.0,
            decider=self.decider,
            journal=self.journal,
            blobs=SimpleNamespace(has=lambda digest: True, read=self._rotten),
            courier=SimpleNamespace(engine=None),
            supply=SimpleNamespace(lease_ids=("1", "2"), lose=self.lost.append),
            workbench=SimpleNamespace(trainer=None),
            tally=Tally(),
            spawn=lambda work: None,
        )

    def _rotten(self, digest):
        raise Refused(Code.BLOB_CORRUPT, "it has changed on disk")


async def test_a_coordinator_that_has_forgotten_is_told_what_it_signed_before_any_record(tmp_path):
    rosters = {epoch: roster(epoch) for epoch in range(8)}
    stand = Stand(tmp_path, rosters=rosters, rollbacks=(rollback(1), rollback(2)), branch=2)
    for number in (3, 4):
        stand.journal.append(entry(number))
    stand.coordinator.news = {"epoch": 5, "branch": 1, "head_round": 3}
    await stand.liaison.beat()
    recalled, *records = stand.coordinator.calls
    assert recalled == (None, (), 2)
    assert records[0] == (None, (6, 7), 0)
    assert [number for number, _, _ in records[1:]] == [3, 4]


@pytest.mark.parametrize("news", [{"epoch": 6}, {"branch": 0}])
async def test_one_forgotten_thing_is_enough(tmp_path, news):
    stand = Stand(tmp_path, rosters={7: roster(7)}, rollbacks=(rollback(1),), branch=1)
    stand.coordinator.news = {**news, "head_round": 9}
    await stand.liaison.beat()
    assert stand.coordinator.calls[0] == (None, (), 1) and stand.coordinator.calls[-1] == "read"


async def test_nothing_is_brought_to_a_coordinator_that_knows_all(tmp_path):
    stand = Stand(tmp_path, rosters={7: roster(7)}, rollbacks=(rollback(1),), branch=1)
    await stand.liaison.beat()
    assert not stand.coordinator.calls


async def test_many_forgotten_rosters_are_brought_in_messages_that_it_takes(tmp_path):
    stand = Stand(tmp_path, rosters={epoch: roster(epoch) for epoch in range(60)})
    stand.coordinator.news = {"epoch": -1}
    await stand.liaison.beat()
    brought = [epochs for _, epochs, _ in stand.coordinator.calls]
    assert [epoch for epochs in brought for epoch in epochs] == list(range(60))
    assert max(map(len, brought)) <= ROSTERS_RECALLED_MAX


async def test_leases_that_were_not_renewed_are_lost_unless_a_record_that_we_lack_may_have_used_them(tmp_path):
    stand = Stand(tmp_path)
    stand.coordinator.news = {"renewed": ("2",), "head_round": 6}
    await stand.liaison.beat()
    assert not stand.lost
    stand.coordinator.news = {"renewed": ("2",), "head_round": 5}
    await stand.liaison.beat()
    assert stand.lost == [frozenset({"1"})]


async def test_a_part_that_rotted_here_does_not_end_the_node_that_is_asked_for_it(tmp_path):
    stand = Stand(tmp_path)
    stand.coordinator.news = {"wanted": (Digest("77" * 32),)}
    await stand.liaison.beat()
    await stand.liaison.beat()
    assert not stand.coordinator.calls
