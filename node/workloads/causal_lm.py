"""Next-token prediction with any causal language model that transformers builds from a config."""

from __future__ import annotations

import torch
from torch.nn import functional

from protocol import model
from protocol.model import Size


def measure(model_config: str) -> Size:
    return model.measure(model_config)


def build(model_config: str) -> torch.nn.Module:
    return model.build(model_config)


def loss(module: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = module(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def hidden_matrices(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    ends = {id(each.weight) for each in module.modules() if isinstance(each, torch.nn.Embedding)}
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if head is not None:
        ends.add(id(head.weight))
    return [each for each in module.parameters() if each.ndim == 2 and each.requires_grad and id(each) not in ends]
