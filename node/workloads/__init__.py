"""What can be trained, by name. A workload is code that came with this program, never with a run."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Protocol, cast

from protocol.errors import Code, Refused

if TYPE_CHECKING:
    import torch

    from protocol.model import Size

_MODULES = {"causal_lm": "node.workloads.causal_lm"}  # imported late: they load torch


class Workload(Protocol):
    """A module of this package offers these functions."""

    def measure(self, model_config: str) -> Size: ...

    def build(self, model_config: str) -> torch.nn.Module: ...

    def loss(self, module: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss summed over all tokens of (sequences, context)."""

    def hidden_matrices(self, module: torch.nn.Module) -> list[torch.nn.Parameter]:
        """The parameters that act as matrices between hidden layers: those that Muon is for."""


def load(name: str) -> Workload:
    if name not in _MODULES:
        nearest = difflib.get_close_matches(name, _MODULES, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise Refused(Code.MODEL_BAD, f"no workload is called {name[:40]!r}{hint}")
    return cast(Workload, importlib.import_module(_MODULES[name]))
