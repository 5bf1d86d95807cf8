"""Encoded updates, and the config of the model that they are of."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import strategies as st

from protocol.codec import NAMES, codec
from protocol.errors import Refused
from tests.fuzz.target import split, target

_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 257,
}


@target(
    st.sampled_from(("llama", "gpt2", "mamba", "mixtral", "qwen3", "gemma3_text")).map(
        lambda name: json.dumps({"model_type": name, **_LLAMA}, sort_keys=True).encode()
    )
)
def model(data: bytes) -> None:
    """A model's config as a manifest carries it; nothing is built, for that takes seconds."""
    from protocol import model as models

    config_of = models._from_json(data.decode("utf-8", "replace"))
    text = models._to_json(config_of)
    assert models._to_json(models._from_json(text)) == text


@target(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 5000), st.integers(0, 2**32 - 1)).map(
        lambda drawn: (
            b"%s %d\n" % (drawn[0].encode(), drawn[1])
            + codec(drawn[0]).encode(np.random.default_rng(drawn[2]).standard_normal(drawn[1]).astype(np.float32))
        )
    )
)
def update(data: bytes) -> None:
    """A part of an update: taken by `check` if and only if by every way to decode it, and to the same finite values."""
    head, body = split(data)
    name, _, count = head.partition(" ")
    if name not in NAMES or not count.isascii() or not count.isdigit() or len(count) > 6:
        return
    chosen, values = codec(name), int(count)
    try:
        chosen.check(body, values)
    except Refused:
        for decode in (chosen.decode, lambda *given: list(chosen.decode_chunks(*given))):
            try:
                decode(body, values)
            except Refused:
                continue
            raise AssertionError("decoded what check refuses") from None
        raise
    found = chosen.decode(body, values)
    assert np.isfinite(found).all()
    pieces = [piece.copy() for _, piece in chosen.decode_chunks(body, values)]
    assert np.array_equal(np.concatenate(pieces) if pieces else np.empty(0, np.float32), found)
    again = chosen.encode(found)
    assert chosen.encode(chosen.decode(again, values)) == again
