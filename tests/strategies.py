"""What travels and what lies on a disk, as hypothesis strategies. `of(kind)` makes values of any type that has canonical
bytes; the others make the bytes of what is not JSON. Used by property tests, and as the seeds of `make fuzz`."""

from __future__ import annotations

import inspect
import types
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import NewType, Union, get_args, get_origin, get_type_hints

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from coordinator.core.leases import Cursor
from coordinator.core.strikes import Mark
from coordinator.ingest import Corpus
from coordinator.orders import JudgeOrder, RollbackOrder
from node.journal import Promise
from node.link import Door
from node.progress import Progress
from node.standing import Standing
from protocol import canonical, identity, messages
from protocol import types as values
from protocol.contribution import Complaint
from protocol.evidence import Basis
from protocol.identity import Key, SignedTicket
from protocol.limits import CHUNK_VALUES
from protocol.proof import Evidence
from protocol.tls import SignedEndorsement

KEY = Key(Ed25519PrivateKey.from_private_bytes(b"\1" * 32))  # the same in every process, so that found cases stay found
RUN = identity.run_id(KEY.public, "fuzz")
NOW_MS = 1_800_000_000_000
PEER = identity.peer_id_of(KEY.public_bytes)
DIGESTS = tuple(character * 64 for character in "05af")


def _declared_in(module: types.ModuleType) -> list[type]:
    kinds = (kind for _, kind in inspect.getmembers(module, is_dataclass))
    return [kind for kind in kinds if kind.__module__ == module.__name__]


CANONICAL = {  # every type whose canonical bytes are read from a wire, a file or a database
    kind.__name__: kind
    for kind in (
        *_declared_in(values),
        *_declared_in(messages),
        *(
            SignedTicket,
            SignedEndorsement,
            Basis,
            Complaint,
            Evidence,
            Promise,
            Progress,
            Door,
            Standing,
            RollbackOrder,
            JudgeOrder,
            Mark,
            Corpus,
            Cursor,
        ),
    )
}

_INTEGERS = (
    st.integers(0, 8) | st.sampled_from((CHUNK_VALUES, NOW_MS, 2**53, 2**63 - 1, -1)) | st.integers(0, 2**63 - 1)
)
_KNOWN = {
    values.NodeId: st.sampled_from((KEY.public, KEY.public, *DIGESTS)),
    values.PeerId: st.sampled_from((PEER, PEER, "12D3KooW")),
    values.RunId: st.just(RUN),
    values.Digest: st.sampled_from(DIGESTS),
    bool: st.booleans(),
    int: _INTEGERS,
    str: st.sampled_from((KEY.public, DIGESTS[0], "a" * 128, "/ip4/10.0.0.1/tcp/4001", "1f", "name", "{}"))
    | st.text(max_size=8),
    type(None): st.none(),
}


@cache
def of(kind: object) -> st.SearchStrategy:
    """Values of a type that protocol/canonical.py writes: its fields fit their types, and nothing else is promised."""
    if kind in _KNOWN:
        return _KNOWN[kind]
    if isinstance(kind, NewType):
        return of(kind.__supertype__)
    if get_origin(kind) in (Union, types.UnionType):
        return st.one_of(*map(of, get_args(kind)))
    if get_origin(kind) is tuple:
        return st.lists(of(get_args(kind)[0]), max_size=3).map(tuple)
    if issubclass(kind, Enum):
        return st.sampled_from(kind)
    hints = get_type_hints(kind)
    return st.builds(kind, **{field.name: of(hints[field.name]) for field in fields(kind)})


@cache
def of_message(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Protobuf messages of this type: any field may be missing, empty, or hold what its type allows."""
    drawn = {field.name: _of_field(field) for field in kind.DESCRIPTOR.fields}
    return st.fixed_dictionaries({}, optional=drawn).map(lambda given: kind(**given))


def _of_field(field: FieldDescriptor) -> st.SearchStrategy:
    one = {
        FieldDescriptor.TYPE_STRING: _KNOWN[str],
        FieldDescriptor.TYPE_BYTES: st.binary(max_size=40) | canonical_values.map(canonical.to_bytes),
        FieldDescriptor.TYPE_BOOL: st.booleans(),
        FieldDescriptor.TYPE_DOUBLE: st.floats(),
        FieldDescriptor.TYPE_UINT32: st.integers(0, 3) | st.integers(0, 2**32 - 1),
        FieldDescriptor.TYPE_UINT64: st.integers(0, 3) | st.sampled_from((2**53, 2**63, 2**64 - 1)),
    }[field.type]
    return st.lists(one, max_size=20) if field.is_repeated else one


def examples(strategy: st.SearchStrategy, count: int) -> list:
    """So many of its values, the same ones each time."""
    found: list = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: object) -> None:
        found.append(value)

    collect()
    return found


canonical_values = st.sampled_from(sorted(CANONICAL)).flatmap(lambda name: of(CANONICAL[name]))
hosts = st.sampled_from(("a.example", "10.0.0.1", "[2001:db8::7]", "localhost", "xn--bcher-kva.example"))
addresses = st.builds("{}:{}".format, hosts, st.integers(1, 65535))
