"""A contribution: what a member brings to a round, and the proof that it is its own. Knows no clock and no network.

Its weight is the data it was trained on, and that data is what the coordinator has granted to this node: so no member,
and no leader in a member's name, can bring weight that was never leased. It names the digest of its encoded vector
before anybody has seen a byte of it, so that what is looked into afterwards was fixed before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from protocol import canonical, identity
from protocol.errors import Code, Refused
from protocol.identity import Key
from protocol.limits import RANGES_MAX
from protocol.state import Consumed
from protocol.types import Contribution, DataRange, Digest, Grant, Lease, NodeId, RoundNumber, RunId

GRANT: Final = "grant"  # what the coordinator signs
BROUGHT: Final = "contribution"  # what its member signs
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Complaint:
    """A member's word that what it was sent as this is not what was signed, or that no codec reads it. It proves nothing."""

    round: RoundNumber
    previous: Digest  # the head that the contribution is signed for
    contribution: Contribution


@dataclass(frozen=True)
class _Granted:
    run: RunId
    node: NodeId
    range: DataRange


@dataclass(frozen=True)
class _Brought:
    """A contribution is for one round that follows one head: in another it means nothing."""

    run: RunId
    round: RoundNumber
    previous: Digest
    contribution: Contribution  # without its signature


def sign_grant(key: Key, run: RunId, node: NodeId, data: DataRange) -> str:
    """The coordinator's signature (hex) for `Grant`."""
    return key.sign(GRANT, canonical.to_bytes(_Granted(run, node, data)))


def grant_of(lease: Lease) -> Grant:
    return Grant(lease.range, lease.signature)


@lru_cache(maxsize=4096)  # a lease lasts for many rounds, and each is asked for again by every message of a round
def grant_is_genuine(run: RunId, node: NodeId, grant: Grant) -> bool:
    try:
        body = canonical.to_bytes(_Granted(run, node, grant.range))
        identity.verify(identity.coordinator_key(run), GRANT, body, grant.signature)
    except Refused:
        return False
    return True


def sign(key: Key, run: RunId, round_number: RoundNumber, previous: Digest, contribution: Contribution) -> Contribution:
    """The contribution, signed for the round that follows this head."""
    return replace(contribution, signature=key.sign(BROUGHT, _body(run, round_number, previous, contribution)))


def is_genuine(run: RunId, round_number: RoundNumber, previous: Digest, contribution: Contribution) -> bool:
    """Whether its member brought it to this very round, trained on data that was granted to it."""
    try:
        check_genuine(run, round_number, previous, contribution)
    except Refused:
        return False
    return True


@lru_cache(maxsize=1024)  # of the rounds that are open: each stands in dozens of messages
def check_genuine(run: RunId, round_number: RoundNumber, previous: Digest, contribution: Contribution) -> None:
    """Refuse what its member did not bring to this round, and what holds data that was not granted to it."""
    node = contribution.node
    if not _DIGEST.fullmatch(contribution.update):
        raise Refused(Code.RECORD_BAD, f"the contribution of {canonical.shown(node[:12])} names no update")
    body = _body(run, round_number, previous, contribution)
    identity.verify(node, BROUGHT, body, contribution.signature)
    if not all(grant_is_genuine(run, node, grant) for grant in contribution.grants):
        raise Refused(Code.RECORD_BAD, f"{node[:12]} shows a grant that is not the coordinator's")
    granted = Consumed().with_ranges(grant.range for grant in contribution.grants)
    if not all(map(granted.covers, contribution.ranges)):
        raise Refused(Code.RECORD_BAD, f"{node[:12]} brings data that was not granted to it")


def check_shape(contribution: Contribution) -> None:
    """Refuse what no honest member brings, whoever has signed it."""
    for what, count in (("ranges", len(contribution.ranges)), ("grants", len(contribution.grants))):
        if count > RANGES_MAX:
            raise Refused(Code.RECORD_BAD, f"a contribution of {count} {what}, at most {RANGES_MAX} are allowed")
    if contribution.tokens < 0:
        raise Refused(Code.RECORD_BAD, f"a contribution of {contribution.tokens} tokens")
    for span in (*contribution.ranges, *(grant.range for grant in contribution.grants)):
        check_range(span)


def check_range(span: DataRange) -> None:
    if span.pass_number < 0 or not 0 <= span.start < span.stop or not _DIGEST.fullmatch(span.shard):
        what = f"data range [{span.start}, {span.stop}) in pass {span.pass_number} of {canonical.shown(span.shard)}"
        raise Refused(Code.RECORD_BAD, what)


def _body(run: RunId, round_number: RoundNumber, previous: Digest, contribution: Contribution) -> bytes:
    return canonical.to_bytes(_Brought(run, round_number, previous, replace(contribution, signature="")))
