"""The model: a Hugging Face config as a torch module and as one flat float32 vector. Never runs remote code.

Only processes that train, evaluate, check or export import this file: it loads torch and transformers.
"""

# ruff: noqa: E402 - the environment must be set before transformers is imported

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_name] = "1"  # a config must not make transformers fetch anything
os.environ["USE_HUB_KERNELS"] = "NO"  # nor run kernels that someone published

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from protocol import canonical
from protocol.errors import Code, Refused
from protocol.limits import CONTEXT_MAX, PARAMETERS_MAX, VOCABULARY_MAX
from protocol.types import Digest

transformers_logging.set_verbosity_error()  # its hints are for people who call it by hand

Vector = NDArray[np.float32]
Layout = tuple[tuple[str, tuple[int, ...]], ...]  # ordered (name, shape); tied weights once

CONFIG_BYTES_MAX = 64 << 10  # published configs are under 10 kB
INTEGER_MAX = 1 << 31  # of any size in a config: far above every real one, far below overflow
LAYERS_MAX = 1024  # each is a Python object even when nothing is allocated
EXPERTS_MAX = 1 << 16  # in all layers together, for the same reason
_FROM_DATA = ("vocab_size", "max_position_embeddings")
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Size:
    """What a config amounts to, found without allocating a weight."""

    layout: Layout
    parameters: int
    digest: Digest


def model_config(architecture: str, values: Mapping[str, Any], *, vocabulary: int, context: int) -> str:
    """The complete config as JSON: the run file's keys, the sizes that the data decides, and every default."""
    for key in _FROM_DATA:
        if key in values:
            raise Refused(Code.MODEL_BAD, f"{key} is set in [model], but it comes from the data", fix="Remove the key.")
    known = _known_keys(architecture)
    from_data = dict(zip(_FROM_DATA, (vocabulary, context), strict=True))
    filled = dict(values) | {key: from_data[key] for key in _FROM_DATA if key in known}  # not all bound the context
    config = _config(architecture, filled)
    for key in _TOKEN_IDS:
        default = getattr(config, key, None)
        if key in known and key not in values and isinstance(default, int) and default >= vocabulary:
            filled[key] = None  # the default belongs to the architecture's own tokenizer
    return _to_json(_config(architecture, filled))


def measure(config_json: str, *, parameters_max: int = PARAMETERS_MAX) -> Size:
    """Count the parameters on the meta device; refuse what does not fit the cap."""
    config = _from_json(config_json)
    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises whatever its model code meets
        raise Refused(Code.MODEL_BAD, f"{config.model_type}: {_brief(error)}") from error
    shapes = layout(module)
    parameters = count(shapes)
    if parameters > parameters_max:
        raise Refused(Code.MODEL_TOO_LARGE, f"the model has {parameters:,} parameters, at most {parameters_max:,} fit")
    return Size(shapes, parameters, canonical.digest(shapes))


def build(config_json: str, *, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The module on the CPU with fresh weights from torch's random state. Call `measure` first."""
    module: torch.nn.Module = AutoModelForCausalLM.from_config(_from_json(config_json), dtype=dtype)
    return module


def initial_vector(config_json: str, seed: int) -> Vector:
    """state(0): the weights that the architecture starts with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(config_json)
    vector = np.empty(count(layout(module)), np.float32)
    flatten(module, vector)
    return vector


def layout(module: torch.nn.Module) -> Layout:
    return tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())


def count(shapes: Layout) -> int:
    return sum(math.prod(shape) for _, shape in shapes)


@torch.no_grad()
def flatten(module: torch.nn.Module, out: Vector) -> None:
    """Write every parameter into one vector, in the layout's order."""
    for parameter, piece in _pieces(module, out):
        piece.copy_(parameter.detach().reshape(-1))


@torch.no_grad()
def load(module: torch.nn.Module, vector: Vector) -> None:
    """Set every parameter from one vector, in the layout's order."""
    for parameter, piece in _pieces(module, vector):
        parameter.copy_(piece.view(parameter.shape))


def _pieces(module: torch.nn.Module, vector: Vector) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    parameters = list(module.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    assert vector.shape == (sum(sizes),), f"a vector of {vector.shape}, wanted {sum(sizes)} values"
    writable = vector if vector.flags.writeable else vector.copy()  # torch has no read-only tensors
    return list(zip(parameters, torch.split(torch.from_numpy(writable), sizes), strict=True))


def _to_json(config: PreTrainedConfig) -> str:
    known = _own_keys(type(config))
    values = {key: value for key, value in config.to_dict().items() if key in known}
    try:
        return json.dumps({"model_type": config.model_type, **values}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Refused(Code.MODEL_BAD, f"{config.model_type} has a default that is not JSON: {error}") from error


def _from_json(text: str) -> PreTrainedConfig:
    if len(text) > CONFIG_BYTES_MAX:
        raise Refused(Code.MODEL_BAD, f"a config of {len(text)} characters, at most {CONFIG_BYTES_MAX}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(Code.MODEL_BAD, f"the config is not JSON: {error}") from error
    architecture = values.pop("model_type", None) if isinstance(values, dict) else None
    if not isinstance(architecture, str):
        raise Refused(Code.MODEL_BAD, "the config names no model_type")
    return _config(architecture, values)


def _config(architecture: str, values: Mapping[str, Any]) -> PreTrainedConfig:
    known = _known_keys(architecture)
    for key in values:
        if key not in known:
            raise Refused(
                Code.MODEL_BAD, f"{architecture} has no key {canonical.shown(repr(key))}{_nearest(key, known)}"
            )
    _check_values(values, architecture)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(architecture, **values)
    except Exception as error:  # transformers raises whatever its config code meets
        raise Refused(Code.MODEL_BAD, f"{architecture}: {_brief(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise Refused(Code.MODEL_BAD, f"{architecture} has an encoder; wanted a decoder that predicts the next token")
    _check_sizes(config)
    return config


def _known_keys(architecture: str) -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or architecture not in CONFIG_MAPPING:
        nearest = _nearest(architecture, set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        shown = canonical.shown(repr(architecture))
        raise Refused(Code.MODEL_BAD, f"no causal language model is called {shown}{nearest}")
    try:
        kind = CONFIG_MAPPING[architecture]
    except Exception as error:  # an architecture whose own dependencies are not installed
        raise Refused(Code.MODEL_BAD, f"{architecture}: {_brief(error)}") from error
    if kind.sub_configs:
        raise Refused(Code.MODEL_BAD, f"{architecture} has parts beside the text model; wanted a text model")
    return _own_keys(kind) | {key for key, to in kind.attribute_map.items() if to in _own_keys(kind)}


def _own_keys(kind: type[PreTrainedConfig]) -> set[str]:
    """The keys that describe the model: not those that say how to run it, where from, or with what code."""
    own = set(kind.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    return {key for key in own if not key.startswith("_")}


def _nearest(word: object, known: set[str]) -> str:
    found = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return canonical.shown(f"{type(error).__name__}: {text}" if len(text.split()) < 2 else text)


def _check_values(value: Any, place: str) -> None:
    """No number that could overflow a size, and no private key at any depth."""
    match value:
        case Mapping():
            for key, item in value.items():
                if str(key).startswith("_") or "implementation" in str(key):
                    raise Refused(Code.MODEL_BAD, f"{place} may not set {canonical.shown(repr(key))}")
                _check_values(item, f"{place}.{key}")
        case list() | tuple():
            for item in value:
                _check_values(item, place)
        case bool() | str() | None:
            pass
        case int() | float():
            if not -INTEGER_MAX <= value <= INTEGER_MAX:  # also refuses NaN
                raise Refused(
                    Code.MODEL_BAD, f"{canonical.shown(place)} is {canonical.shown(str(value))}, at most {INTEGER_MAX}"
                )
        case _:
            raise Refused(Code.MODEL_BAD, f"{canonical.shown(place)} is a {type(value).__name__}, not JSON")


def _check_sizes(config: PreTrainedConfig) -> None:
    layers = getattr(config, "num_hidden_layers", 1) or 1
    experts = [value for key, value in vars(config).items() if "expert" in key and type(value) is int]
    bounds = (
        ("vocab_size", getattr(config, "vocab_size", None), VOCABULARY_MAX),
        ("max_position_embeddings", getattr(config, "max_position_embeddings", 1), CONTEXT_MAX),
        ("hidden_size", getattr(config, "hidden_size", 1), INTEGER_MAX),
        ("num_hidden_layers", layers, LAYERS_MAX),
        ("experts in all layers", layers * max(experts, default=0) or 1, EXPERTS_MAX),
    )
    for name, value, bound in bounds:
        if not (isinstance(value, int) and 1 <= value <= bound):
            raise Refused(Code.MODEL_BAD, f"{name} is {value}, wanted 1 to {bound}")
