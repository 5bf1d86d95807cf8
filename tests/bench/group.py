"""Real engines that know each other, for the parts of the bench that need no daemon."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from coordinator.rendezvous import Rendezvous
from node.engine import AveragingJob, AveragingOutcome, Engine
from protocol.exchange import Packing, layout
from protocol.identity import Key, libp2p_private_key_bytes
from protocol.types import Exchange, Role, RunId
from tests.signing import SigningEngine

RUN = RunId("ab" * 32 + ".bench")
LOCAL = "/ip4/127.0.0.1/tcp/0"


@asynccontextmanager
async def engines_of(
    parameters: int,
    packing: Packing,
    listen: Sequence[str],
    *,
    meeting: str = LOCAL,
    enter: Callable[[int | None], object],
) -> AsyncIterator[list[Engine]]:
    """One engine for each address, and their rendezvous. `enter` is called before each is started, with its index."""
    async with AsyncExitStack() as owned:
        folder = Path(owned.enter_context(tempfile.TemporaryDirectory(prefix="barnraise-bench-")))
        enter(None)
        key = _identity(folder / "rendezvous")
        rendezvous = await Rendezvous.start(
            runtime_dir=key.parent / "run", identity_path=key, run=RUN, listen=[meeting]
        )
        owned.push_async_callback(rendezvous.stop)
        engines = []
        for index, address in enumerate(listen):
            key = _identity(folder / f"node-{index}")
            enter(index)
            engine = await SigningEngine.start(
                runtime_dir=key.parent / "run",
                identity_path=key,
                run=RUN,
                listen=[address],
                rendezvous=rendezvous.addresses,
                coordinator="127.0.0.1",
                packing=packing,
                parameters=parameters,
                blob_dir=key.parent,
                on_message=lambda peer, letter: None,
            )
            owned.push_async_callback(engine.stop)
            engines.append(engine)
        enter(None)
        await rendezvous.set_roster([engine.peer for engine in engines])
        for engine in engines:
            await engine.set_roster({other.peer: other.addresses for other in engines if other is not engine})
        yield engines


async def average(
    engines: Sequence[Engine],
    payloads: Sequence[bytes],
    weights: Sequence[int],
    parameters: int,
    packing: Packing,
) -> list[AveragingOutcome]:
    exchange, spans = layout_of(len(engines), parameters, packing)
    job = AveragingJob(
        group=os.urandom(32),
        peers=tuple(engine.peer for engine in engines),
        weights=tuple(weights),
        exchange=exchange,
        spans=spans,
        deadline_seconds=120,
        sender_seconds=30,
        members=(),
        attempt=0,
    )
    outcomes = await asyncio.gather(*(e.average(job, data) for e, data in zip(engines, payloads, strict=True)))
    for outcome in outcomes:
        if outcome.evidence is not None:
            outcome.evidence.unlink()
    assert all(not outcome.failed for outcome in outcomes), [outcome.failed for outcome in outcomes]
    return outcomes


def layout_of(nodes: int, parameters: int, packing: Packing) -> tuple[Exchange, tuple[tuple[int, int], ...]]:
    roles = [Role.PEER] * nodes
    exchange = packing.exchange(roles)
    return exchange, layout(exchange, parameters, roles)


def _identity(home: Path) -> Path:
    home.mkdir()
    (home / "identity").write_bytes(libp2p_private_key_bytes(Key.generate()))
    return home / "identity"
