"""What a round costs on the wire: bytes on the interface against the bytes that the values themselves take.

Everything counts: TCP, TLS, libp2p, the rendezvous and its DHT, acknowledgements, and the round's own signed letters
(promises, the call, claims, the proposal, votes, the certificate). Measured on loopback, in a network namespace of
its own as root, and on a small Ethernet of namespaces with frames of 1500 bytes where that can be made.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from node import letters
from node.engine import AveragingOutcome, Engine
from protocol.codec import NAMES
from protocol.contribution import sign, sign_grant
from protocol.exchange import Packing, packing_of
from protocol.identity import Key
from protocol.log import PROPOSAL, VOTE, record_hash, vote_bytes
from protocol.messages import Begin, Claim, Commit, Message, Propose, Ready, SignedReady, Vote
from protocol.runspec import UpdateSection
from protocol.types import (
    Ballot,
    Certificate,
    Contribution,
    DataRange,
    Digest,
    Epoch,
    Exchange,
    Grant,
    Part,
    Record,
    RoundNumber,
    Signature,
    VoteBody,
)
from tests.bench import ethernet
from tests.bench.ethernet import Counted, Network
from tests.bench.group import LOCAL, RUN, average, engines_of, layout_of
from tests.bench.table import Row, show

GOAL = 1.05
SETTLE_SECONDS = 0.2  # for the last acknowledgements
HEADER_BYTES = 14 + 20 + 32  # of a frame: Ethernet, IPv4, TCP with its timestamps
TOKENS = 25 * 16 * 256  # of one node in one round
RANGES = 3  # of data that a node used in one round


@dataclass(frozen=True)
class Measured:
    sent: float  # bytes of one node in one round, as all below
    received: float
    first: float  # sent in the first round, handshakes included
    packets: float
    letters: float
    seconds: float
    idle: float  # bytes sent in a second between rounds


class Talk:
    """The letters of a round as the round machine sends them, with contents of the usual size."""

    def __init__(self, engines: Sequence[Engine], packing: Packing, parameters: int) -> None:
        self._engines = engines
        self._exchange, self._spans = layout_of(len(engines), parameters, packing)
        self._keys = [Key.generate() for _ in engines]
        self.bytes_sent = 0

    async def before(self, number: int) -> None:
        """Everyone promises to everyone; the leader calls."""
        ballot, lead = Ballot(Epoch(3), 0), number % len(self._keys)
        readies = [
            Ready(RUN, RoundNumber(number), _digest("previous"), ballot, key.public, self._brought(key, number), None)
            for key in self._keys
        ]
        await asyncio.gather(*(self._to_others(index, ready) for index, ready in enumerate(readies)))
        signed = tuple(
            SignedReady(ready, letters.seal(key, ready)[1]) for key, ready in zip(self._keys, readies, strict=True)
        )
        begin = Begin(RUN, RoundNumber(number), ballot, self._keys[lead].public, signed)
        await self._to_others(lead, begin)

    async def after(self, number: int, outcomes: Sequence[AveragingOutcome]) -> None:
        """Reducers claim to the leader, which proposes; all vote; the leader hands out the certificate."""
        ballot, lead, round_number = Ballot(Epoch(3), 0), number % len(self._keys), RoundNumber(number)
        parts = tuple(self._part(index, outcome) for index, outcome in enumerate(outcomes))
        await asyncio.gather(
            *(
                self._to(lead, index, Claim(RUN, round_number, ballot, key.public, part))
                for (index, key), part in zip(enumerate(self._keys), parts, strict=True)
            )
        )
        leader = self._keys[lead].public
        brought = tuple(self._brought(key, number) for key in self._keys)
        link = (RUN, round_number, _digest("previous"), ballot.epoch, leader)
        record = Record(*link, brought, parts, _digest("state"), self._exchange)
        body = VoteBody(RUN, round_number, ballot, record_hash(record))
        proposed = self._keys[lead].sign(PROPOSAL, vote_bytes(body))
        await self._to_others(lead, Propose(RUN, round_number, ballot, leader, record, proposed))
        votes = [
            Vote(RUN, round_number, ballot, key.public, body.record, key.sign(VOTE, vote_bytes(body)))
            for key in self._keys
        ]
        await asyncio.gather(*(self._to(lead, index, vote) for index, vote in enumerate(votes)))
        signatures = tuple(Signature(vote.sender, vote.signature) for vote in votes)
        certificate = Certificate(body.record, ballot, signatures)
        await self._to_others(lead, Commit(RUN, round_number, leader, record, certificate))

    def _brought(self, key: Key, number: int) -> Contribution:
        ranges = tuple(
            DataRange(0, _digest(f"shard {index}"), number * 400, number * 400 + 400) for index in range(RANGES)
        )
        grants = tuple(Grant(span, sign_grant(key, RUN, key.public, span)) for span in ranges)
        told = Contribution(key.public, TOKENS, ranges, grants, _digest("update"))
        return sign(key, RUN, RoundNumber(number), _digest("previous"), told)

    def _part(self, index: int, outcome: AveragingOutcome) -> Part:
        data, (start, stop) = outcome.parts[index], self._spans[index]
        author = self._keys[index].public
        everyone = tuple(key.public for key in self._keys)
        included = (author,) if self._exchange is Exchange.ALL_GATHER else everyone
        digest = Digest(hashlib.sha256(data).hexdigest())
        return Part(index, start, stop, digest, len(data), author, included)

    async def _to_others(self, author: int, message: Message) -> None:
        await asyncio.gather(*(self._to(index, author, message) for index in range(len(self._keys))))

    async def _to(self, index: int, author: int, message: Message) -> None:
        if index == author:
            return
        letter, _ = letters.seal(self._keys[author], message)
        self.bytes_sent += len(letter)
        await self._engines[author].send(self._engines[index].peer, letter, timeout_seconds=10)


async def measure(
    packing: Packing, nodes: int, parameters: int, rounds: int, idle_seconds: float, network: Network | None
) -> Measured:
    def counted() -> list[Counted]:
        return [network.counted(index) for index in range(nodes)] if network else [ethernet.interface("lo")]

    listen = [f"/ip4/{network.address(index)}/tcp/0" if network else LOCAL for index in range(nodes)]
    meeting = f"/ip4/{network.address(None)}/tcp/0" if network else LOCAL
    enter = network.enter if network else lambda index: None
    random, seconds = np.random.default_rng(0), []
    async with engines_of(parameters, packing, listen, meeting=meeting, enter=enter) as engines:
        payloads = [packing.up.encode(random.standard_normal(parameters, np.float32)) for _ in engines]
        talk = Talk(engines, packing, parameters)
        seen = [counted()]
        for number in range(rounds):
            await talk.before(number)
            outcomes = await average(engines, payloads, [TOKENS] * nodes, parameters, packing)
            await talk.after(number, outcomes)
            seconds.append(max(outcome.seconds for outcome in outcomes))
            await asyncio.sleep(SETTLE_SECONDS)
            seen.append(counted())
        await asyncio.sleep(idle_seconds)
        quiet = sum(each.sent for each in counted()) - sum(each.sent for each in seen[-1])
    totals = [[sum(values) for values in zip(*map(_numbers, each), strict=True)] for each in seen]
    spent = [(last - first) / nodes / rounds for first, last in zip(totals[0], totals[-1], strict=True)]
    return Measured(
        sent=spent[0],
        received=spent[1],
        first=(totals[1][0] - totals[0][0]) / nodes,
        packets=spent[2],
        letters=talk.bytes_sent / nodes / rounds,
        seconds=float(np.median(seconds)),
        idle=quiet / nodes / idle_seconds if idle_seconds else 0.0,
    )


def rows_of(packing: Packing, nodes: int, parameters: int, medium: str, measured: Measured) -> list[Row]:
    ideal = packing.sent_bytes(parameters, nodes)
    headers = measured.packets * HEADER_BYTES
    title = f"{nodes} nodes, {medium}"
    return [
        Row(f"{title}: up", measured.sent / ideal, at_most=GOAL, digits=4, note=f"{measured.sent:,.0f} bytes"),
        Row("  up, for each parameter", measured.sent / parameters, "bytes", digits=4),
        Row(
            f"{title}: down", measured.received / ideal, at_most=GOAL, digits=4, note=f"{measured.received:,.0f} bytes"
        ),
        Row("  of it headers of frames", headers / ideal, digits=4, note=f"{measured.packets:,.0f} frames"),
        Row("  of it the round's letters", measured.letters / ideal, digits=4, note=f"{measured.letters:,.0f} bytes"),
        Row("  first round, with handshakes: up", measured.first / ideal, digits=4),
        Row("  between rounds", measured.idle, "bytes/s", digits=0),
        Row("  time of the averaging", measured.seconds * 1000, "ms", digits=0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--codec", choices=NAMES, default="int4")
    parser.add_argument("--idle-seconds", type=float, default=5.0)
    given = parser.parse_args()
    packing, rows, notes = packing_of(UpdateSection(codec=given.codec)), [], []
    media = ("lo", "Ethernet") if ethernet.possible() else ("lo",)
    if len(media) == 1:
        notes.append("No Ethernet: it needs root and iproute2.")
    for nodes, medium in itertools.product(given.nodes, media):
        network = Network(nodes) if medium == "Ethernet" else None
        if network is None and not ethernet.enter_own_network():
            notes.append("No network namespace of its own: other traffic on lo was counted too.")
        work = measure(packing, nodes, given.parameters, given.rounds, given.idle_seconds, network)
        rows += rows_of(packing, nodes, given.parameters, medium, asyncio.run(work))
    for nodes in given.nodes:
        share = packing.update_bytes(given.parameters, nodes) / nodes
        ratio = share / packing.sent_bytes(given.parameters, nodes)
        rows.append(
            Row(f"{nodes} nodes: archiving adds, up", ratio, digits=4, note=f"{share:,.0f} bytes, by arithmetic")
        )
    notes = [
        f"1 = the encoded values of an exchange of {given.codec} for {given.parameters:,} parameters, up and down alike;"
        f" {given.rounds} rounds, the first with its handshakes included.",
        "Archiving: each part goes to the coordinator once, over gRPC, from the node that reduced it.",
        *notes,
    ]
    show("wire", rows, *notes)


def _numbers(each: Counted) -> tuple[int, int, int, int]:
    return each.sent, each.received, each.packets_sent, each.packets_received


def _digest(text: str) -> Digest:
    return Digest(hashlib.sha256(text.encode()).hexdigest())


if __name__ == "__main__":
    main()
