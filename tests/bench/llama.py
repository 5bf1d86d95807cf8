"""The models of the bench: small Llamas in the proportions of large ones."""

from __future__ import annotations

from typing import Any


def sizes(hidden: int, layers: int = 4) -> dict[str, Any]:
    """What a run file says under [model] config."""
    return {
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": max(2, hidden // 64),
        "tie_word_embeddings": True,
    }


def config(hidden: int, layers: int = 4, *, vocabulary: int, context: int) -> str:
    """The whole config, as a manifest carries it."""
    from protocol import model  # imports torch

    return model.model_config("llama", sizes(hidden, layers), vocabulary=vocabulary, context=context)
