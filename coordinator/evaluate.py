"""The evaluator process: held-out loss and samples of text, on one thread and at low priority; it has no network.

`coordinator.evaluation` owns it. It serves one request at a time: start, loss, sample.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from coordinator.tokenizer import Tokenizer, byte_tokenizer
from protocol import model
from protocol.errors import Code, Refused
from protocol.process import Channel, ChannelClosed, parent_channel

NICENESS: Final = 10  # training nodes on the same machine come first
LOGITS_MAX: Final = 1 << 24  # computed at once: 64 MiB, and as much again for the loss


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
        model.load(self._module, np.asarray(self._vector))
        step = max(1, LOGITS_MAX // (self._context * self._vocabulary))
        total = 0.0
        with torch.inference_mode():
            for first in range(0, len(self._heldout), step):
                sequences = self._heldout[first : first + step]
                logits = self._module(input_ids=sequences, use_cache=False).logits.float()
                targets = self._targets[first : first + step].flatten()
                losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
                total += losses.double().sum().item()
        mean = total / self._heldout.numel()
        return mean if math.isfinite(mean) else None

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

    def _read(self, path: Path, token_bytes: int, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences and what comes next in them, as the trainer cuts them: each is `context` predictions."""
        tokens = np.fromfile(path, f"<u{token_bytes}", sequences * self._context + 1).astype(np.int64)
        whole = (len(tokens) - 1) // self._context
        if whole < 1:
            raise Refused(Code.DATA_EMPTY, f"{len(tokens)} held-out tokens; one sequence takes {self._context + 1}")
        if tokens.max() >= self._vocabulary:
            raise Refused(Code.TOKEN_RANGE, f"token {tokens.max()} held out; the vocabulary has {self._vocabulary}")
        shape, stop = (whole, self._context), whole * self._context
        return torch.from_numpy(tokens[:stop].reshape(shape)), torch.from_numpy(tokens[1 : stop + 1].reshape(shape))


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
