"""Orders: what a command asks of the coordinator that serves the run. They wait in the database until it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from coordinator.core.strikes import Kind
from protocol import canonical
from protocol.errors import Code, Refused
from protocol.limits import REASON_CHARACTERS_MAX
from protocol.types import NodeId

ROLLBACK: Final = "rollback"  # the kind of an order whose body is a RollbackOrder
JUDGE: Final = "judge"  # … a JudgeOrder


@dataclass(frozen=True)
class RollbackOrder:
    to: int  # records that stay
    reason: str

    def to_bytes(self) -> bytes:
        return canonical.to_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> RollbackOrder:
        order = canonical.from_bytes(cls, data)
        _check_reason(ROLLBACK, order.reason)
        if order.to < 0:
            raise Refused(Code.FIELD, f"a rollback to round {order.to}")
        return order


@dataclass(frozen=True)
class JudgeOrder:
    """A ban, a kick or an unban."""

    node: NodeId
    kind: Kind
    reason: str
    seconds: int = 0  # how long a kick lasts
    revoke_invite: bool = False  # also the invite that it came with

    def to_bytes(self) -> bytes:
        return canonical.to_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> JudgeOrder:
        order = canonical.from_bytes(cls, data)
        _check_reason(order.kind.value, order.reason)
        if order.kind not in (Kind.BAN, Kind.KICK, Kind.UNBAN) or (order.kind is Kind.KICK) != (order.seconds > 0):
            raise Refused(Code.FIELD, f"an order to {order.kind.value} for {order.seconds} s")
        return order


def _check_reason(what: str, reason: str) -> None:
    if len(reason) > REASON_CHARACTERS_MAX or not reason.isprintable():
        raise Refused(Code.FIELD, f"a {what} for a reason of {len(reason)} characters")
