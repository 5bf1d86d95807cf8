"""What the ledger and a rollback come to, as facts for a script and as sentences for a person."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from coordinator.output import counted, table_text
from protocol import console
from protocol.errors import Code, Refused

if TYPE_CHECKING:
    from coordinator.core.ledger import Books
    from coordinator.folder import RunFolder
    from coordinator.ledger import Verdict
    from coordinator.store import Evaluation, Store

SHORT_ID: Final = 8  # characters that tell nodes apart on a screen


def ledger_facts(books: Books, now_ms: int) -> dict[str, Any]:
    from coordinator import view
    from coordinator.core.ledger import balances
    from coordinator.core.strikes import shut

    out = {node: shut(trail, now_ms) for node, trail in books.trails.items()}
    nodes = [
        dict(vars(each)) | {"shut_out": mark.reason if (mark := out.get(each.node)) is not None else None}
        for each in balances(books, now_ms)
    ]
    gone = [each.rollback for _, each in sorted(books.rollbacks.items())]
    return {
        "nodes": nodes,
        "tokens": sum(each["tokens"] for each in nodes),
        "undone_tokens": sum(each["undone_tokens"] for each in nodes),
        "frozen_tokens": sum(each["frozen_tokens"] for each in nodes),
        "records": len(books.entries),
        "undone_records": sum(1 for row in books.entries if row.undone_by is not None),
        "rollbacks": [view.rollback(each) for each in gone],
    }


def ledger_text(books: Books, now_ms: int) -> str:
    facts = ledger_facts(books, now_ms)
    rows: list[tuple[str, ...]] = [
        (
            console.printable(each["name"]),
            console.printable(each["node"][:SHORT_ID]),
            f"{each['tokens']:,}",
            f"{each['undone_tokens']:,}" if each["undone_tokens"] else "",
            f"{each['rounds']:,}",
            f"{each['frozen_tokens']:,}" if each["frozen_tokens"] else "",
            console.printable(each["shut_out"] or "yes") if each["shut_out"] is not None else "",
        )
        for each in facts["nodes"]
    ]
    if not rows:
        return "No nodes yet."
    total = f"{facts['tokens']:,} tokens of {counted(len(rows), 'node')} in {counted(facts['records'], 'record')}"
    if facts["undone_records"]:
        undone = f"{counted(facts['undone_records'], 'record')} and {facts['undone_tokens']:,} tokens"
        total += f"; {counted(len(facts['rollbacks']), 'rollback')} undid {undone} of them, credited all the same"
    if facts["frozen_tokens"]:
        total += f"; {facts['frozen_tokens']:,} of them are frozen: audits found them void, or their node was shut out before"
    head: tuple[str, ...] = ("NAME", "NODE", "TOKENS", "UNDONE", "ROUNDS", "FROZEN", "SHUT OUT")
    while not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return f"{table_text(head, rows)}\n{total}."


def verdict_text(verdict: Verdict) -> str:
    records = counted(verdict.records, "record")
    if verdict.rollbacks:
        records += f" and {verdict.undone:,} that {counted(verdict.rollbacks, 'rollback')} undid"
    said = (
        f"✓ Every row is what the log says: {records}, {counted(verdict.tokens, 'token')} in"
        f" {counted(verdict.sequences, 'sequence')} of data that each count once, {counted(verdict.nodes, 'node')},"
        f" {counted(verdict.rosters, 'roster')}, {counted(verdict.signatures, 'signature')},"
        f" {counted(verdict.bases, 'base checkpoint')}, {counted(verdict.evaluations, 'evaluation')}."
    )
    if verdict.folded is not None:
        said += f"\n✓ The archive folds to the same states: {counted(verdict.folded, 'record')}"
        said += f"; {counted(verdict.waiting, 'record')} wait for parts." if verdict.waiting else "."
    return said


def rollback_facts(folder: RunFolder, store: Store, to: int) -> dict[str, Any]:
    """What going back to this round means, as the database has it now."""
    if store.get("manifest") is None:
        what = f"the run in {folder.path} was never started, so it has no log"
        raise Refused(Code.RUN_MISSING, what, fix="Run: barnraise-coordinator start")
    head = store.entry_count
    if to > head:
        raise Refused(Code.RUN_MISSING, f"round {to}, the log has 0 to {head}", fix="Choose one of them.")
    undone = [contribution for entry in store.entries(to) for contribution in entry.record.contributions]
    measured = [row for row in store.history() if row.heldout is not None and math.isfinite(row.heldout)]
    return {
        "to": to,
        "head": head,
        "undone_rounds": head - to,
        "undone_tokens": sum(each.tokens for each in undone),
        "heldout": _measured(measured, to),
        "heldout_now": _measured(measured, head),
    }


def _measured(rows: Sequence[Evaluation], to: int) -> dict[str, Any] | None:
    """The held-out loss at this round, or the nearest before it."""
    found = next((row for row in reversed(rows) if row.round <= to), None)
    return None if found is None else {"round": found.round, "loss": found.heldout}


def rollback_text(facts: Mapping[str, Any]) -> str:
    to, head = facts["to"], facts["head"]
    if to == head:
        return (
            f"Round {to:,} is the newest: nothing is undone. The run gets a new roster of the nodes that are here,\n"
            "and goes on with their majority; what others may have certified meanwhile no longer counts."
        )
    lines = [
        f"Going back to round {to:,} of {head:,} undoes {counted(facts['undone_rounds'], 'round')} and"
        f" {facts['undone_tokens']:,} tokens of training."
    ]
    then, now = facts["heldout"], facts["heldout_now"]
    if then is not None:
        line = f"Held-out loss was {then['loss']:.4f} after {counted(then['round'], 'round')}"
        later = now is not None and now["round"] > then["round"]
        lines.append(f"{line}; it is {now['loss']:.4f} after {now['round']:,}." if later else f"{line}.")
    lines.append(
        "Volunteers' nodes follow by themselves: they take the earlier state, drop what they trained since, and go on.\n"
        "Their credit stays; the data of the undone rounds is trained on again."
    )
    return "\n".join(lines)
