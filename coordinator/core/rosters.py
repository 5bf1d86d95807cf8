"""Who is rostered next, and when that is safe. A roster may only follow if no two majorities can miss each other.

Changing the members of a running Paxos group is safe when every majority of the old group meets every
majority of the new one (Lamport, Malkhi, Zhou, "Vertical Paxos", 2009): then whatever was decided under the
old roster is seen by everyone who decides under the new one. Two sets with majorities q and q' always meet
when q + q' exceeds the number of nodes in either of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from protocol.limits import MEMBERS_MAX
from protocol.types import Epoch, Member, NodeId, Roster


def quorum(members: int) -> int:
    return members // 2 + 1


def may_follow(old: Iterable[NodeId], new: Iterable[NodeId], sealed: Iterable[NodeId] = ()) -> bool:
    """Whether every majority of `new` shares a node with every majority of `old` that can still come about.

    Those who are `sealed` have voted for nothing and will not vote under `old`."""
    before, after = set(old), set(new)
    voters = before - set(sealed)
    if len(voters) < quorum(len(before)):
        return bool(after)
    return bool(after) and quorum(len(before)) + quorum(len(after)) > len(voters | after)


def next_members(
    open_rosters: Sequence[Roster], desired: Sequence[Member], seals: Mapping[NodeId, Epoch] | None = None
) -> tuple[Member, ...] | None:
    """The members of the next roster: `desired`, or the longest safe step towards it; None to leave it as it is.

    `open_rosters` are all those under which a record may still be decided, the newest last; `seals` names those who
    sign nothing more under the rosters up to an epoch."""
    desired = tuple(desired)[:MEMBERS_MAX]
    if not open_rosters:
        return desired or None
    current = open_rosters[-1].members
    if not desired or _same(current, desired):
        return None
    wished = {member.node: member for member in desired}

    def safe(nodes: Sequence[NodeId]) -> bool:
        return all(
            may_follow(roster.nodes, nodes, [node for node, epoch in (seals or {}).items() if epoch >= roster.epoch])
            for roster in open_rosters
        )

    kept = [member.node for member in current]
    for node in [node for node in kept if node not in wished]:
        fewer = [other for other in kept if other != node]
        if safe(fewer):
            kept = fewer
    for member in desired:
        if member.node not in kept and safe([*kept, member.node]):
            kept.append(member.node)
    known = {member.node: member for member in current} | wished
    chosen = tuple(known[node] for node in kept)
    return None if _same(current, chosen) or not safe(kept) else chosen


def _same(left: Sequence[Member], right: Sequence[Member]) -> bool:
    return {m.node: m for m in left} == {m.node: m for m in right}
