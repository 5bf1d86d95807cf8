"""The evaluator's owner: starts the process that measures a model and asks it; imports no torch."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protocol import sandbox
from protocol.blobs import full_disk_refused
from protocol.errors import Code, Refused
from protocol.process import ChannelClosed, Child

STOP_SECONDS: Final = 2.0  # it holds nothing that would need saving


class Evaluator:
    """Held-out loss and samples, one at a time. Whoever starts it must `stop` it; after CHILD_DIED start another."""

    def __init__(self, child: Child, vector: Path) -> None:
        self._child = child
        self._path = vector
        self._turn = asyncio.Lock()
        self._exchanges: set[asyncio.Task[Mapping[str, Any]]] = set()

    @classmethod
    async def start(
        cls,
        *,
        folder: Path,
        model_config: str,
        parameters: int,
        heldout: Path,
        token_bytes: int,
        context: int,
        sequences: int,
        tokenizer: Path | None,
        audited: Sequence[Path] = (),
        threads: int = 1,
        log: Any = None,
    ) -> Evaluator:
        """Returns when the model is built and the held-out data read; `folder` takes the shared parameters.

        `audited`: the folders that the files of an audit's order lie in. Nothing else can be read."""
        handle, name = tempfile.mkstemp(prefix="evaluator-", suffix=".f32", dir=folder)
        try:
            os.truncate(handle, 4 * parameters)
        except BaseException:
            Path(name).unlink()
            raise
        finally:
            os.close(handle)
        reads = [path for path in (Path(name), heldout, tokenizer, *audited) if path is not None]
        inside = sandbox.plan(sandbox.Mode.AUTO, sandbox.kernel(), read=reads)
        try:
            # torch wants a cache folder when it is imported: without a name for it, it tries to write where it may not.
            env = {"TORCHINDUCTOR_CACHE_DIR": str(folder.absolute())}
            child = await Child.start("coordinator.evaluate", log=log, sandbox=inside, env=env)
        except BaseException:
            Path(name).unlink()
            raise
        evaluator = cls(child, Path(name))
        try:
            await evaluator._ask(
                {
                    "do": "start",
                    "vector": name,
                    "model_config": model_config,
                    "heldout": str(heldout),
                    "token_bytes": token_bytes,
                    "context": context,
                    "sequences": sequences,
                    "tokenizer": str(tokenizer) if tokenizer is not None else None,
                    "threads": threads,
                }
            )
        except BaseException:
            await evaluator.stop()
            raise
        return evaluator

    @property
    def pid(self) -> int:
        return self._child.pid

    async def loss(self, parameters: NDArray[np.float32]) -> float | None:
        """Nats per token over the held-out sequences; none if the model computes no finite number."""
        answer = await self._ask({"do": "loss"}, parameters)
        assert answer is None or isinstance(answer, float)
        return answer

    async def sample(
        self, parameters: NDArray[np.float32], prompt: str, *, tokens: int, seed: int, temperature: float = 0.8
    ) -> str:
        """Text that the model writes. It may hold any character: escape it before it is shown."""
        order = {"do": "sample", "prompt": prompt, "tokens": tokens, "seed": seed, "temperature": temperature}
        return str(await self._ask(order, parameters))

    async def audit(self, order: Mapping[str, Any]) -> Mapping[str, float] | None:
        """The gains of one encoded contribution: the fields of core.audits.Measured.

        None if its round began from a state that computes no numbers; UPDATE_BAD is refused if no codec reads it."""
        answer: Mapping[str, float] | None = await self._ask({"do": "audit", **order})
        return answer

    async def stop(self) -> None:
        await self._child.stop(grace_seconds=STOP_SECONDS)
        self._path.unlink(missing_ok=True)

    async def _ask(self, order: Mapping[str, Any], parameters: NDArray[np.float32] | None = None) -> Any:
        """Whoever asks may be cancelled; the exchange is ended all the same, or the next would read its answer."""
        exchange = asyncio.create_task(self._exchange(order, parameters))
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._ended)
        reply = await asyncio.shield(exchange)
        match reply:
            case {"refused": str(code), "what": str(what)}:
                raise Refused.from_wire(code, what)
            case {"answer": answer}:
                return answer
        await self._child.stop(grace_seconds=0)
        raise Refused(Code.CHILD_DIED, "the evaluator said what is no answer")

    async def _exchange(self, order: Mapping[str, Any], parameters: NDArray[np.float32] | None) -> Mapping[str, Any]:
        async with self._turn:
            if parameters is not None:
                await asyncio.to_thread(self._write, parameters)
            try:
                await self._child.channel.send(order)
                return (await self._child.channel.receive()).body
            except ChannelClosed as error:
                raise Refused(Code.CHILD_DIED, "the evaluator ended in the middle of its work") from error

    def _write(self, parameters: NDArray[np.float32]) -> None:
        """Where its process has mapped them. Through a map of ours, a full disk would end us by a signal."""
        with full_disk_refused(self._path.parent), self._path.open("r+b") as file:
            file.write(np.ascontiguousarray(parameters, np.float32).data)

    def _ended(self, exchange: asyncio.Task[Mapping[str, Any]]) -> None:
        self._exchanges.discard(exchange)
        if not exchange.cancelled():
            exchange.exception()  # seen here, should nobody wait for it any more
