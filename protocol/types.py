"""Ids and frozen values that both sides speak of; knows nothing of bytes, files or sockets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import NewType

NodeId = NewType("NodeId", str)  # hex of a node's 32-byte Ed25519 public key
PeerId = NewType("PeerId", str)  # base58 libp2p peer id
RunId = NewType("RunId", str)  # hex of the coordinator's public key, a dot, the run's name
Digest = NewType("Digest", str)  # hex SHA-256
RoundNumber = NewType("RoundNumber", int)  # the round that leads from state r to state r + 1
Epoch = NewType("Epoch", int)  # which signed roster


class Role(Enum):
    """What a member does in a round: a peer reduces its share, a client none, a helper more."""

    PEER = "peer"
    CLIENT = "client"
    HELPER = "helper"


class Exchange(Enum):
    """How a group's contributions become an update: reducers average slices, or everybody gets all and averages."""

    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"


class Fault(Enum):
    """What was proved against a node, or said by most of the others. No crash, no bad network and no slow machine makes an
    honest node do so."""

    FORGED = "forged"  # it put into a record what the member it names had not signed
    REDUCED_WRONG = "reduced-wrong"  # its mean is not that of the contributions which it says are inside
    TRAINED_WRONG = "trained-wrong"  # what it brought is not what training on its data gives
    GARBLED = "garbled"  # what it sent to most of the others is not what it signed: each of them says so
    SLANDERED = "slandered"  # it says so of most of the others, who show what they signed
    WITHHELD = "withheld"  # it was there, and time after time did not show what it had signed
    CONTRADICTED = "contradicted"  # it signed two letters of which an honest node signs one


@dataclass(frozen=True)
class Member:
    """One active node as its peers see it."""

    node: NodeId
    peer: PeerId
    addresses: tuple[str, ...]  # libp2p multiaddrs without the /p2p suffix
    weight_cap: int  # most tokens that count for it in one round
    role: Role = Role.PEER

    @property
    def is_callable(self) -> bool:
        """Whether the others can call it; a roster in which nobody can be called decides nothing."""
        return self.role is not Role.CLIENT


@dataclass(frozen=True)
class Roster:
    """The coordinator's list of active nodes. Its order is the order of every group."""

    run: RunId
    epoch: Epoch
    members: tuple[Member, ...]
    issued_ms: int
    floor: RoundNumber = RoundNumber(0)  # members act under it from this round on: those before it are decided
    branch: int = 0  # it decides only where the log has followed so many rollbacks
    manifest: Digest = Digest("")  # digest of the run's: whoever was shown another one finds it here
    after: Epoch = Epoch(-1)  # of the newest roster that the coordinator knew of

    @property
    def quorum(self) -> int:
        """Fewest signatures that certify: a strict majority."""
        return len(self.members) // 2 + 1

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(member.node for member in self.members)

    def member(self, node: NodeId) -> Member | None:
        return next((member for member in self.members if member.node == node), None)


@dataclass(frozen=True)
class SignedRoster:
    roster: Roster
    signature: str  # hex; the coordinator's, purpose "roster"


@dataclass(frozen=True)
class DataRange:
    """Positions [start, stop) in one shard's order of one pass (protocol/order.py). A sequence is `context` tokens."""

    pass_number: int
    shard: Digest
    start: int
    stop: int

    def overlaps(self, other: DataRange) -> bool:
        same = self.pass_number == other.pass_number and self.shard == other.shard
        return same and self.start < other.stop and other.start < self.stop

    def common(self, other: DataRange) -> DataRange | None:
        """What both hold."""
        if not self.overlaps(other):
            return None
        return replace(self, start=max(self.start, other.start), stop=min(self.stop, other.stop))


@dataclass(frozen=True)
class Lease:
    """A range of data granted to one node until a time on the coordinator's clock."""

    lease_id: str
    node: NodeId
    range: DataRange
    until_ms: int
    signature: str = ""  # of the grant, hex; empty in the coordinator's own books


@dataclass(frozen=True)
class Grant:
    """The coordinator's word that a node may train on a range. It outlives the lease: the data may be trained by then."""

    range: DataRange
    signature: str  # hex; the coordinator's, purpose "grant", over run, node and range


@dataclass(frozen=True)
class Seal:
    """A leaving member's word: it has voted for nothing in this round, and signs nothing more under these rosters."""

    round: RoundNumber
    epoch: Epoch  # and all before it


@dataclass(frozen=True, order=True)
class Ballot:
    """One attempt to decide a round. Higher ballots supersede lower ones (Paxos, Lamport 2001)."""

    epoch: Epoch
    attempt: int


@dataclass(frozen=True)
class Contribution:
    """What a member brings to a round: the data it trained on, its weight in tokens, and the proof of both.

    Without tokens it is only somebody's presence, and proves nothing."""

    node: NodeId
    tokens: int
    ranges: tuple[DataRange, ...]
    grants: tuple[Grant, ...] = ()  # they cover the ranges
    update: Digest = Digest("")  # of its encoded vector, all of it
    signature: str = ""  # hex; its member's, purpose "contribution", over all this and the round's head


@dataclass(frozen=True)
class Part:
    """One encoded slice [start, stop) of the parameter vector: a mean, or in an all-gather one whole contribution."""

    index: int
    start: int
    stop: int
    digest: Digest
    size: int  # encoded bytes
    reducer: NodeId  # who made it
    included: tuple[NodeId, ...]  # whose contributions the mean holds
    evidence: BlobRef | None = (
        None  # what the mean was made of; none where nobody has to believe it, or nobody can check
    )
    signature: str = ""  # hex; the reducer's, purpose "part", over all this, the round's head and the weights inside


@dataclass(frozen=True)
class Record:
    """What a round decided. It says nothing of the ballot, so a re-proposal has the same hash."""

    run: RunId
    round: RoundNumber
    previous: Digest  # hash of the record before it; of the manifest for round 0
    epoch: Epoch  # the roster that certifies it
    leader: NodeId
    contributions: tuple[Contribution, ...]
    parts: tuple[Part, ...]
    state: Digest  # digest of the state that this record is folded into, state(round)
    exchange: Exchange = Exchange.ALL_REDUCE


@dataclass(frozen=True)
class Signature:
    node: NodeId
    value: str  # hex Ed25519 signature of the canonical bytes of a VoteBody


@dataclass(frozen=True)
class VoteBody:
    run: RunId
    round: RoundNumber
    ballot: Ballot
    record: Digest


@dataclass(frozen=True)
class Certificate:
    """Signatures of a strict majority of the ballot's roster; a record proposed again may name an earlier one."""

    record: Digest
    ballot: Ballot
    signatures: tuple[Signature, ...]


@dataclass(frozen=True)
class LogEntry:
    record: Record
    certificate: Certificate


@dataclass(frozen=True)
class Head:
    """How far a log goes: the number of certified records, and the hash of the last of them."""

    round: RoundNumber
    hash: Digest


@dataclass(frozen=True)
class Rollback:
    """The coordinator's word that the log goes on from an earlier head; what was certified after it is undone.

    It is a link of the chain: the next record is of round `to.round` again, and follows the digest of this value."""

    run: RunId
    number: int  # 1, 2, 3 … in the life of a run: the branch that begins here
    to: Head  # how many records stay, and the hash of the last of them (of the manifest for none)
    undone: Head  # the newest head that the coordinator knew of
    reason: str
    issued_ms: int


@dataclass(frozen=True)
class SignedRollback:
    rollback: Rollback
    signature: str  # hex; the coordinator's, purpose "rollback"


@dataclass(frozen=True)
class Shard:
    """A content-addressed token file: little-endian unsigned ints of `token_bytes` each."""

    digest: Digest  # root of its chunk tree
    size: int  # bytes
    tokens: int
    sequences: int  # how many ranges of `context` tokens it holds


@dataclass(frozen=True)
class BlobRef:
    digest: Digest
    size: int


@dataclass(frozen=True)
class Manifest:
    """What a run is: everything a node must know before it downloads a byte. Signed by the coordinator."""

    run: RunId
    name: str
    spec: str  # the run file, as canonical JSON of its checked values
    model_config: str  # Hugging Face config JSON
    tokenizer: BlobRef | None  # tokenizer.json; none means bytes
    vocabulary: int
    parameters: int
    layout: Digest  # over the ordered (name, shape) list
    genesis: Digest  # state digest of state(0)
    context: int
    token_bytes: int
    data: Digest  # over the run's shards in their order: all nodes train on these
    transformers: str  # the version of the library that made the layout


@dataclass(frozen=True)
class SignedManifest:
    manifest: Manifest
    signature: str  # hex; the coordinator's, purpose "manifest"


@dataclass(frozen=True)
class Pass:
    """Membership: binds a node key to the libp2p peer id that the node proved it owns."""

    run: RunId
    node: NodeId
    peer: PeerId
    name: str
    issued_ms: int
    expires_ms: int


@dataclass(frozen=True)
class SignedPass:
    body: Pass
    signature: str  # hex; the coordinator's, purpose "pass"


@dataclass(frozen=True)
class BaseCheckpoint:
    """A whole state at some round, so that catching up need not start at round 0."""

    round: RoundNumber
    head: Digest  # hash of the record before it; of the manifest for round 0
    state: Digest
    blob: BlobRef
    branch: int = 0  # the rollbacks that the log had followed
