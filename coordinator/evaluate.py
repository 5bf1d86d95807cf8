"""The evaluator process: held-out loss, samples of text, audits; on one thread and at low priority, without a network.

`coordinator.evaluation` owns it. It serves one request at a time: start, loss, sample, audit.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from coordinator.core.audits import SAMPLED, STRIDE, Measured
from coordinator.tokenizer import Tokenizer, byte_tokenizer
from protocol import model
from protocol.codec import Floats, codec
from protocol.errors import Code, Refused
from protocol.order import sequence_at
from protocol.process import Channel, ChannelClosed, parent_channel

NICENESS: Final = 10  # training nodes on the same machine come first
LOGITS_MAX: Final = 1 << 24  # computed at once: 64 MiB, and as much again for the loss


Text = tuple[torch.Tensor, torch.Tensor]  # inputs and targets


class Evaluation:
    """A model, the held-out tokens it is measured on, and the shared vector its parameters come from."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        torch.set_num_threads(order["threads"])
        self._config: str = order["model_config"]
        self._context: int = order["context"]
        self._vector = np.memmap(order["vector"], np.float32, "r")
        self._tokenizer = Tokenizer(Path(order["tokenizer"]).read_bytes()) if order["tokenizer"] else byte_tokenizer()
        self._module = model.build(self._config).eval()
        self._vocabulary: int = json.loads(self._config)["vocab_size"]
        self._heldout, self._targets = self._read(Path(order["heldout"]), order["token_bytes"], order["sequences"])

    def loss(self) -> float | None:
        """Mean cross entropy in nats per predicted token; nothing if it is not a finite number."""
        mean = float(self._losses(np.asarray(self._vector), self._heldout, self._targets).mean())
        return mean if math.isfinite(mean) else None

    def gains(self, before: Floats, following: Floats, update: Floats, own: Text, elsewhere: Text) -> Measured | None:
        """What a step of STRIDE times this decoded contribution gains, in nats per token (coordinator/core/audits.py).

        `before` and `following`: the states that its round led from and to. `own` and `elsewhere`: inputs and targets,
        (sequences, context) each, of its own data and of the others'. Nothing if the state itself computes no numbers."""
        stride = np.float32(STRIDE)
        was = [self._losses(before, *each) for each in (own, elsewhere)]
        if not all(np.isfinite(each).all() for each in was):
            return None
        alone = before - stride * update
        now = [self._losses(alone, *each) for each in (own, elsewhere)]
        together = before + stride * (following - before)
        known = [self._losses(together, *each) for each in (own, elsewhere)]
        with np.errstate(invalid="ignore", divide="ignore"):
            here, there = (old - new for old, new in zip(was, now, strict=True))
            more_here, more_there = (all_of_us - new for all_of_us, new in zip(known, now, strict=True))
            length = float(np.linalg.norm(update) / np.linalg.norm(following - before))
            usual = was[0] - known[0]
            return Measured(
                *_mean(here), length, *_difference(here, there), *_difference(more_here, more_there), *_mean(usual)
            )

    def audit(self, order: Mapping[str, Any]) -> Mapping[str, float] | None:
        """The gains of an encoded contribution, whose bytes may be anything: the order names files and positions."""
        before, following = (np.memmap(order[name], np.float32, "r") for name in ("state", "following"))
        update = codec(order["codec"]).decode(Path(order["update"]).read_bytes(), before.size)
        own = self._read_positions(order["token_bytes"], order["data"])
        elsewhere = self._heldout[:SAMPLED], self._targets[:SAMPLED]
        if order["elsewhere"]:
            elsewhere = self._read_positions(order["token_bytes"], order["elsewhere"])
        gains = self.gains(np.asarray(before), np.asarray(following), update, own, elsewhere)
        return None if gains is None else asdict(gains)

    def _losses(self, vector: Floats, inputs: torch.Tensor, targets: torch.Tensor) -> NDArray[np.float64]:
        """Mean cross entropy of each sequence."""
        model.load(self._module, vector)
        step = max(1, LOGITS_MAX // (self._context * self._vocabulary))
        found: list[torch.Tensor] = []
        with torch.inference_mode():
            for first in range(0, len(inputs), step):
                here, there = inputs[first : first + step], targets[first : first + step]
                logits = self._module(input_ids=here, use_cache=False).logits.float()
                losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), there.flatten(), reduction="none")
                found.append(losses.view(there.shape).double().mean(dim=1))
        return torch.cat(found).numpy()

    def sample(self, prompt: str, *, tokens: int, seed: int, temperature: float) -> str:
        """What the model writes after the prompt; an empty prompt is the start of a document."""
        model.load(self._module, np.asarray(self._vector))
        torch.manual_seed(seed)
        tokens = min(tokens, self._context - 1)
        ids = [self._tokenizer.end, *self._tokenizer.encode(prompt)][tokens - self._context :]
        written: list[int] = []
        fed, cache = torch.tensor([ids]), None
        with torch.inference_mode():
            while len(written) < tokens:
                output = self._module(input_ids=fed, past_key_values=cache, use_cache=True)
                chosen = _choose(output.logits[0, -1].float(), temperature)
                if chosen is None or chosen == self._tokenizer.end:
                    break
                written.append(chosen)
                fed, cache = torch.tensor([[chosen]]), output.past_key_values
        return self._tokenizer.decode(written)

    def _read(self, path: Path, token_bytes: int, sequences: int) -> Text:
        """Sequences and what comes next in them, as the trainer cuts them: each is `context` predictions."""
        tokens = np.fromfile(path, f"<u{token_bytes}", sequences * self._context + 1).astype(np.int64)
        whole = (len(tokens) - 1) // self._context
        if whole < 1:
            raise Refused(Code.DATA_EMPTY, f"{len(tokens)} held-out tokens; one sequence takes {self._context + 1}")
        if tokens.max() >= self._vocabulary:
            raise Refused(Code.TOKEN_RANGE, f"token {tokens.max()} held out; the vocabulary has {self._vocabulary}")
        shape, stop = (whole, self._context), whole * self._context
        return torch.from_numpy(tokens[:stop].reshape(shape)), torch.from_numpy(tokens[1 : stop + 1].reshape(shape))

    def _read_positions(self, token_bytes: int, pieces: Sequence[Sequence[Any]]) -> Text:
        """Inputs and targets at these positions: of each shard its path, its sequences, the pass, and which."""
        runs = []
        for path, sequences, pass_number, positions in pieces:
            shard = np.memmap(path, f"<u{token_bytes}", "r")
            for position in positions:
                at = sequence_at(position, sequences=sequences, pass_number=pass_number) * self._context
                runs.append(np.asarray(shard[at : at + self._context + 1], np.int64))
        table = torch.from_numpy(np.stack(runs))
        return table[:, :-1].contiguous(), table[:, 1:].contiguous()


def _mean(values: NDArray[np.float64]) -> tuple[float, float]:
    """With its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def _difference(left: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[float, float]:
    """Of the means, with its standard error."""
    (mean, error), (other, other_error) = _mean(left), _mean(right)
    return mean - other, math.hypot(error, other_error)


def _choose(logits: torch.Tensor, temperature: float) -> int | None:
    """The next token; none when the model computes no numbers."""
    if not bool(torch.isfinite(logits).all()):
        return None
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1))


def _answer(evaluation: Evaluation, order: Mapping[str, Any]) -> Any:
    match order["do"]:
        case "loss":
            return evaluation.loss()
        case "audit":
            return evaluation.audit(order)
        case "sample":
            return evaluation.sample(
                order["prompt"], tokens=order["tokens"], seed=order["seed"], temperature=order["temperature"]
            )
        case other:
            raise AssertionError(other)


async def serve(channel: Channel) -> None:
    """Answer the parent until it closes the channel; a refusal is an answer too."""
    evaluation: Evaluation | None = None
    while True:
        order = (await channel.receive()).body
        try:
            if evaluation is None:
                evaluation = Evaluation(order)
                answer = None
            else:
                answer = _answer(evaluation, order)
        except Refused as refusal:
            await channel.send({"refused": refusal.reason.code, "what": refusal.what})
        else:
            await channel.send({"answer": answer})


async def _main() -> None:
    channel = await parent_channel()
    os.nice(NICENESS)
    with suppress(ChannelClosed):
        await serve(channel)


if __name__ == "__main__":
    asyncio.run(_main())
