"""What shows to anybody that a member lied, and what shows nothing; with real keys and signatures."""

from dataclasses import replace

import pytest

from node.core import witness
from node.core.witness import ROUNDS_KEPT, WORDS_MAX, Witness
from protocol import canonical, contribution, identity
from protocol.errors import Code, Refused
from protocol.identity import Key
from protocol.limits import RANGES_MAX
from protocol.log import PROPOSAL, VOTE, is_brought, record_hash, vote_bytes
from protocol.messages import Accepted, Begin, Claim, Commit, Propose, Ready, SignedReady, Vote
from protocol.proof import Evidence, Said, check_said, double_voters, prove, votes_of
from protocol.types import (
    Ballot,
    Certificate,
    Contribution,
    DataRange,
    Fault,
    Grant,
    LogEntry,
    Member,
    Part,
    Record,
    Roster,
    Signature,
    SignedRoster,
    VoteBody,
)

COORDINATOR, A, B, C = (Key.generate() for _ in range(4))
RUN = identity.run_id(COORDINATOR.public, "test")
DATA = DataRange(0, "5" * 64, 0, 4)
BALLOT = Ballot(2, 1)
MEMBERS = tuple(Member(key.public, f"peer {name}", (), 10**6) for name, key in zip("abc", (A, B, C), strict=True))
ROSTERS = {2: SignedRoster(Roster(RUN, 2, MEMBERS, 0), "s")}
ROUND = 7  # so that the leader of BALLOT is member (7 + 1) % 3: C


def brought(key=A, *, forged=False):
    grant = Grant(DATA, contribution.sign_grant(COORDINATOR, RUN, key.public, DATA))
    told = Contribution(key.public, 64, (DATA,), (grant,), "2" * 64)
    return contribution.sign(B if forged else key, RUN, ROUND, "1" * 64, told)


def record(size=9, **options):
    part = Part(0, 0, 65536, "3" * 64, size, A.public, (A.public,))
    return Record(RUN, ROUND, "1" * 64, 2, C.public, (brought(**options),), (part,), "4" * 64)


def heavy(**fields):
    """A forged record whose contribution costs more to check than anybody brings."""
    return replace(FORGED, contributions=(replace(brought(forged=True), **fields),))


ONE, TWO, FORGED = record(), record(size=10), record(forged=True)
HEAVY = (
    heavy(grants=brought().grants * (RANGES_MAX + 1)),
    heavy(ranges=(DATA,) * (RANGES_MAX + 1)),
    heavy(ranges=(replace(DATA, stop=0),)),
    replace(FORGED, contributions=FORGED.contributions * 2),
)


def said(key, which, purpose=VOTE, *, ballot=BALLOT, round_number=ROUND, run=RUN):
    body = VoteBody(run, round_number, ballot, record_hash(which))
    return Said(key.public, purpose, body, key.sign(purpose, vote_bytes(body)))


def entry(which, *keys, ballot=BALLOT):
    votes = tuple(Signature(key.public, said(key, which, ballot=ballot).signature) for key in keys)
    return LogEntry(which, Certificate(record_hash(which), ballot, votes))


def proposal(which, key=C, accepted=None):
    return Propose(RUN, ROUND, BALLOT, key.public, which, said(key, which, PROPOSAL).signature, accepted)


def vote(key, which):
    word = said(key, which)
    return Vote(RUN, ROUND, BALLOT, key.public, word.body.record, word.signature)


def ready(accepted, key=A):
    return Ready(RUN, ROUND, "1" * 64, Ballot(2, 2), key.public, brought(), accepted)


# proofs


@pytest.mark.parametrize("purpose", [VOTE, PROPOSAL])
def test_two_different_words_in_one_ballot_prove_a_contradiction(purpose):
    pair = said(C, ONE, purpose), said(C, TWO, purpose)
    found = prove(Evidence(*pair), RUN)
    assert (found.node, found.fault, found.round) == (C.public, Fault.CONTRADICTED, ROUND)
    assert prove(Evidence(*reversed(pair)), RUN) == found  # whoever saw them in the other order has no second proof
    again = canonical.from_bytes(Evidence, canonical.to_bytes(Evidence(*pair)))
    assert prove(again, RUN) == found


@pytest.mark.parametrize("purpose", [VOTE, PROPOSAL])
def test_a_word_for_a_record_with_a_forged_contribution_proves_a_forgery(purpose):
    found = prove(Evidence(said(C, FORGED, purpose), record=FORGED), RUN)
    assert (found.node, found.fault) == (C.public, Fault.FORGED)
    assert "was not signed by" in found.what


@pytest.mark.parametrize(
    "evidence",
    [
        Evidence(said(C, ONE)),
        Evidence(said(C, ONE), said(C, ONE)),
        Evidence(said(C, ONE), said(B, TWO)),
        Evidence(said(C, ONE), said(C, TWO, ballot=Ballot(2, 2))),
        Evidence(said(C, ONE), said(C, TWO, PROPOSAL)),
        Evidence(said(C, ONE), said(C, TWO, round_number=8)),
        Evidence(said(C, ONE), replace(said(C, TWO), signature=said(C, ONE).signature)),
        Evidence(replace(said(C, ONE), node=B.public), replace(said(C, TWO), node=B.public)),
        Evidence(said(C, ONE, "peer-message"), said(C, TWO, "peer-message")),
        Evidence(said(C, ONE), record=ONE),
        Evidence(said(C, ONE), record=FORGED),
        Evidence(said(C, FORGED), said(C, TWO), FORGED),
        Evidence(replace(said(C, FORGED), signature="0" * 128), record=FORGED),
        Evidence(said(C, ONE, run="0" * 64 + ".x"), said(C, TWO, run="0" * 64 + ".x")),
        Evidence(said(C, FORGED, round_number=8), record=FORGED),
        *(Evidence(said(C, which), record=which) for which in HEAVY),
    ],
    ids=[
        "one word", "twice the same", "of two nodes", "in two attempts", "a vote and a proposal", "in two rounds",
        "a forged signature", "in another's name", "no vote at all", "a good record", "another record", "all at once",
        "a forged word", "another run", "a record of another round", "more grants than are read", "more ranges", "a range that is none", "a member twice",
    ],
)  # fmt: skip
def test_anything_else_proves_nothing(evidence):
    with pytest.raises(Refused) as caught:
        prove(evidence, RUN)
    assert caught.value.reason in (Code.UNPROVED, Code.SIGNATURE)


def test_of_a_fork_those_are_guilty_who_signed_both_in_one_ballot():
    first, second = entry(ONE, A, C), entry(TWO, B, C)
    (found,) = double_voters(first, second)
    ours, theirs = (next(said for said in votes_of(each) if said.node == C.public) for each in (first, second))
    assert found == prove(Evidence(ours, theirs), RUN) and found.node == C.public
    assert not double_voters(first, entry(TWO, B, C, ballot=Ballot(2, 2)))  # one may vote again in a later ballot
    assert not double_voters(first, entry(ONE, B, C))


# the witness


class Listener:
    def __init__(self, head=ROUND):
        self.state, self.head = Witness(), head
        self.rules = witness.Rules(RUN, _genuine, is_brought)

    def hears(self, *messages):
        found = []
        for message in messages:
            self.state, more = witness.hear(self.state, message, ROSTERS, self.head, self.rules)
            found += more
        return [prove(each, RUN) for each in found]


def _genuine(word):
    try:
        check_said(word)
    except Refused:
        return False
    return True


@pytest.mark.parametrize(
    "letters",
    [
        (proposal(ONE), proposal(TWO)),
        (proposal(ONE), ready(Accepted(BALLOT, TWO, said(C, TWO, PROPOSAL).signature))),
        (
            proposal(ONE, accepted=Accepted(Ballot(2, 0), TWO, "")),
            Begin(
                RUN,
                ROUND,
                BALLOT,
                C.public,
                (SignedReady(ready(Accepted(BALLOT, TWO, said(C, TWO, PROPOSAL).signature)), ""),),
            ),
        ),
        (vote(C, ONE), vote(C, TWO)),
        (vote(C, ONE), Commit(RUN, ROUND, B.public, TWO, entry(TWO, B, C).certificate)),
        (proposal(FORGED),),
        (ready(Accepted(BALLOT, FORGED, said(C, FORGED, PROPOSAL).signature)),),
    ],
    ids=["proposals", "heard of another's", "inside a Begin", "votes", "a certificate", "forged", "forged, heard of"],
)
def test_the_witness_finds_who_lied_in_what_it_hears(letters):
    listener = Listener()
    (found,) = listener.hears(*letters)
    assert found.node == C.public
    assert not listener.hears(*letters)  # told once


def test_the_witness_believes_no_word_that_was_not_signed():
    listener = Listener()
    lie = replace(vote(C, TWO), signature=vote(C, ONE).signature)
    assert not listener.hears(lie, vote(C, ONE))
    assert len(listener.hears(vote(C, TWO))) == 1  # and the false one has not taken the place of the true one


def test_the_witness_says_nothing_of_honest_members():
    said_again = (proposal(ONE), proposal(ONE), vote(A, ONE), vote(A, ONE), vote(B, ONE))
    later = replace(vote(A, TWO), ballot=Ballot(2, 5), signature=said(A, TWO, ballot=Ballot(2, 5)).signature)
    claim = Claim(RUN, ROUND, BALLOT, A.public, None)
    assert not Listener().hears(
        *said_again, later, claim, Commit(RUN, ROUND, A.public, ONE, entry(ONE, A, B).certificate)
    )


def test_what_the_witness_remembers_is_bounded():
    listener = Listener(head=ROUND + ROUNDS_KEPT)
    assert not listener.hears(vote(C, ONE), vote(C, TWO)) and not listener.state.words  # too long ago
    listener.head = ROUND
    listener.rules = witness.Rules(RUN, lambda _: True, is_brought)
    for attempt in range(WORDS_MAX + 10):
        listener.hears(replace(vote(C, ONE), ballot=Ballot(2, attempt)))
    assert len(listener.state.words) == WORDS_MAX
    listener.head += ROUNDS_KEPT
    listener.hears(replace(vote(C, ONE), round=listener.head))
    assert len(listener.state.words) == 1


def test_a_certificate_is_its_votes():
    assert votes_of(entry(ONE, A, C)) == (said(A, ONE), said(C, ONE))
