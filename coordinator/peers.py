"""Who was let in, with which invite, and what was held against them: as facts for a script, as sentences for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from coordinator.accounts import SHORT_ID
from coordinator.core import strikes
from coordinator.core.strikes import Kind, Mark
from coordinator.output import counted, table_text, when_text
from protocol import console
from protocol.errors import Code, Refused
from protocol.types import Role, RoundNumber

if TYPE_CHECKING:
    from coordinator.store import Store, StoredNode

CANDIDATES_SHOWN: Final = 5
SISTERS_SHOWN: Final = 8  # names of those who came with the same invite

_DOES: Final = {
    Role.PEER.value: "takes part",
    Role.CLIENT.value: "outbound-only",
    Role.HELPER.value: "averages for others",
}

Facts = Mapping[str, Any]


def peers_facts(store: Store, now_ms: int) -> list[dict[str, Any]]:
    """Every node that was ever admitted, with its whole trail."""
    nodes, trails, head = store.nodes(), strikes.by_node(store.marks()), store.entry_count
    notes = {each.token_id: each.note for each in store.invites()}
    came = Counter(each.invite for each in nodes)
    newest = store.newest_roster()
    roles = {each.node: each.role for each in newest.roster.members} if newest is not None else {}
    return [
        _facts(each, trails.get(each.node, ()), notes, came, head, now_ms)
        | {"role": roles[each.node].value if each.node in roles else None}
        for each in nodes
    ]


def _facts(
    node: StoredNode,
    trail: Sequence[Mark],
    notes: Mapping[str, str],
    came: Mapping[str | None, int],
    head: int,
    now_ms: int,
) -> dict[str, Any]:
    shut, aside = strikes.shut(trail, now_ms), strikes.aside_until(trail)
    standing = "aside" if aside > head else "welcome"
    if shut is not None:
        standing = "banned" if shut.kind is Kind.BAN else "sent away"
    invite = None
    if node.invite is not None:
        invite = {"id": node.invite, "note": notes.get(node.invite, ""), "nodes": came[node.invite]}
    return {
        "name": node.name,
        "node": node.node,
        "peer": node.peer,
        "credit_tokens": node.credit_tokens,
        "admitted_ms": node.admitted_ms,
        "invite": invite,
        "standing": standing,
        "reason": shut.reason if shut is not None else "",
        "by": shut.by.value if shut is not None else None,
        "until_ms": shut.until_ms if shut is not None else None,
        "until_round": aside if aside > head else None,
        "strikes": len(strikes.faults(trail, Kind.STRIKE)),
        "warnings": len(strikes.faults(trail, Kind.WARNING)),
        "held": strikes.standing(trail, RoundNumber(head), now_ms),
        "trail": [mark_facts(mark) for mark in trail],
    }


def none_is_callable(found: Sequence[Facts]) -> bool:
    """Whether all who are rostered are behind routers that let nothing in."""
    return {each["role"] for each in found} - {None} == {Role.CLIENT.value}


def mark_facts(mark: Mark) -> dict[str, Any]:
    return {
        "kind": mark.kind.value,
        "fault": mark.fault.value if mark.fault is not None else None,
        "reason": mark.reason,
        "by": mark.by.value,
        "ms": mark.ms,
        "round": mark.round,
        "evidence": mark.evidence,
        "until_ms": mark.until_ms,
    }


def peers_text(found: Sequence[Facts]) -> str:
    if not found:
        return "No nodes yet."
    rows = [
        (
            console.printable(each["name"]),
            each["node"][:SHORT_ID],
            console.number_text(each["credit_tokens"]),
            when_text(each["admitted_ms"]),
            each["invite"]["id"][:SHORT_ID] if each["invite"] else "",
            _DOES.get(each["role"], ""),
            console.printable(each["held"]),
        )
        for each in found
    ]
    return table_text(("NAME", "NODE", "TOKENS", "ADMITTED", "INVITE", "ROSTERED", "STANDING"), rows)


def find(found: Sequence[Facts], which: str) -> Facts:
    """The one node of this name, or whose id begins so; refuses what fits none or several, and names those."""
    key = which.strip().lower()
    named = [each for each in found if each["name"].lower() == key]
    fitting = named or [each for each in found if key and each["node"].startswith(key)]
    if len(fitting) == 1:
        return fitting[0]
    shown = console.printable(which[:64])
    if not fitting:
        raise Refused(Code.PEER_UNKNOWN, f"no node is called {shown!r}, and none has an id that begins so")
    names = ", ".join(f"{console.printable(each['name'])} {each['node'][:12]}" for each in fitting[:CANDIDATES_SHOWN])
    more = f" and {len(fitting) - CANDIDATES_SHOWN} more" if len(fitting) > CANDIDATES_SHOWN else ""
    what = f"{len(fitting)} nodes fit {shown!r}: {names}{more}"
    raise Refused(Code.PEER_UNKNOWN, what, fix="Give more digits of the one that you mean.")


def origin_text(found: Sequence[Facts], which: Facts) -> str:
    """With which invite it came, and who else did: an invite for many lets one person be many."""
    name = f"{console.printable(which['name'])} ({which['node'][:SHORT_ID]})"
    invite = which["invite"]
    if invite is None:
        return f"{name} came with no invite that is known."
    sisters = [
        console.printable(each["name"])
        for each in found
        if each["invite"] and each["invite"]["id"] == invite["id"] and each["node"] != which["node"]
    ]
    note = f" ({console.printable(invite['note'])})" if invite["note"] else ""
    came = f"{name} came with invite {invite['id'][:SHORT_ID]}{note}"
    if not sisters:
        return f"{came}, and nobody else did."
    more = f" and {len(sisters) - SISTERS_SHOWN} more" if len(sisters) > SISTERS_SHOWN else ""
    return f"{came}, as did {counted(len(sisters), 'other node')}: {', '.join(sisters[:SISTERS_SHOWN])}{more}."


def nodes_by_invite(store: Store, now_ms: int) -> dict[str, list[dict[str, str]]]:
    """Who came with each invite, and how they stand."""
    came: dict[str, list[dict[str, str]]] = {}
    for each in peers_facts(store, now_ms):
        if each["invite"] is not None:
            told = {key: each[key] for key in ("name", "node", "standing")}
            came.setdefault(each["invite"]["id"], []).append(told)
    return came


def came_text(nodes: Sequence[Mapping[str, str]]) -> str:
    """Their names in one line, as many as fit."""
    names = [
        console.printable(each["name"]) + ("" if each["standing"] == "welcome" else f" ({each['standing']})")
        for each in nodes[:CANDIDATES_SHOWN]
    ]
    more = f" and {len(nodes) - CANDIDATES_SHOWN} more" if len(nodes) > CANDIDATES_SHOWN else ""
    return ", ".join(names) + more
