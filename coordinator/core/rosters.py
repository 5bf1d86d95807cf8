"""Who is rostered next, and when that is safe. A roster may only follow if no two majorities can miss each other.

Changing the members of a running Paxos group is safe when every majority of the old group meets every
majority of the new one (Lamport, Malkhi, Zhou, "Vertical Paxos", 2009): then whatever was decided under the
old roster is seen by everyone who decides under the new one. Two sets with majorities q and q' always meet
when q + q' exceeds the number of nodes in either of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

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


def seated(able: Iterable[tuple[NodeId, str]], rostered: Collection[NodeId]) -> set[NodeId]:
    """Who is rostered where more want to be than can: one of each invite in turn, so that an invite for many gets the
    places that nobody else wants. Members go first in each turn: nobody loses a place to an equal."""
    turns: Counter[str] = Counter()
    queue = []
    for place, (node, invite) in enumerate(sorted(able, key=lambda each: each[0] not in rostered)):
        queue.append((turns[invite], place, node))
        turns[invite] += 1
    return {node for _, _, node in sorted(queue)[:MEMBERS_MAX]}


def next_members(
    open_rosters: Sequence[Roster],
    desired: Sequence[Member],
    seals: Mapping[NodeId, Epoch] | None = None,
    silent: Mapping[NodeId, Epoch] | None = None,
) -> tuple[Member, ...] | None:
    """The members of the next roster: `desired`, or the longest safe step towards it; None to leave it as it is.

    `open_rosters` are all those under which a record may still be decided, the newest last; `seals` names those who
    have voted for nothing and sign nothing more under the rosters up to an epoch. Those who are `silent` sign nothing
    more either, but they have forgotten what they voted for: to the rosters up to that epoch they are strangers."""
    desired = tuple(desired)[:MEMBERS_MAX]
    if not open_rosters:
        return desired or None
    newest, current = open_rosters[-1], open_rosters[-1].members
    forgetful = {node for node, epoch in (silent or {}).items() if epoch >= newest.epoch and newest.member(node)}
    if not desired or (_same(current, desired) and not forgetful):
        return None
    wished = {member.node: member for member in desired}

    def voters(roster: Roster) -> list[NodeId]:
        """Its nodes, where one that has forgotten is another than the one of the same name."""
        return [NodeId(f"{n} before") if (silent or {}).get(n, -1) >= roster.epoch else n for n in roster.nodes]

    def safe(nodes: Sequence[NodeId]) -> bool:
        return all(
            may_follow(voters(roster), nodes, [n for n, epoch in (seals or {}).items() if epoch >= roster.epoch])
            for roster in open_rosters
        )

    kept = [member.node for member in current if member.node not in forgetful]  # each of them makes a step less safe
    able = [member.node for member in desired if member.is_callable]
    if able and not set(able) & set(kept):  # before anybody goes: afterwards it may be unsafe
        kept += next(([node] for node in able if len(kept) < MEMBERS_MAX and safe([*kept, node])), [])
        if not set(able) & set(kept):
            return None  # no record would come of a roster without one, and so no later step either
    for node in [node for node in kept if node not in wished]:
        fewer = [other for other in kept if other != node]
        if safe(fewer):
            kept = fewer
    for member in desired:
        if member.node not in kept and len(kept) < MEMBERS_MAX and safe([*kept, member.node]):
            kept.append(member.node)
    known = {member.node: member for member in current} | wished
    chosen = tuple(known[node] for node in kept)
    changed = not _same(current, chosen) or not forgetful.isdisjoint(kept)
    return chosen if changed and safe(kept) else None


def _same(left: Sequence[Member], right: Sequence[Member]) -> bool:
    return {m.node: m for m in left} == {m.node: m for m in right}
