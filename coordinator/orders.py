"""Orders: what a command asks of the coordinator that serves the run. They wait in the database until it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol import canonical
from protocol.errors import Code, Refused
from protocol.limits import REASON_CHARACTERS_MAX

ROLLBACK: Final = "rollback"  # the kind of an order whose body is a RollbackOrder


@dataclass(frozen=True)
class RollbackOrder:
    to: int  # records that stay
    reason: str

    def to_bytes(self) -> bytes:
        return canonical.to_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> RollbackOrder:
        order = canonical.from_bytes(cls, data)
        if order.to < 0 or len(order.reason) > REASON_CHARACTERS_MAX or not order.reason.isprintable():
            what = f"a rollback to round {order.to} for a reason of {len(order.reason)} characters"
            raise Refused(Code.FIELD, what)
        return order
