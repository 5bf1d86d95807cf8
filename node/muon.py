"""Muon for devices that only emulate bfloat16, which is all that torch's own calculates in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch


class Float32Muon(torch.optim.Muon):
    """torch's Muon, calculating in float32: on a processor without bfloat16 of its own, steps take a twentieth of the time.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # a loss that nobody asks for
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"])
                update = orthogonal(update, group["ns_coefficients"], steps=group["ns_steps"])
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonal(matrix: torch.Tensor, coefficients: Sequence[float], *, steps: int) -> torch.Tensor:
    """About U Vᵀ of the singular value decomposition U S Vᵀ: Newton-Schulz steps take singular values to about 1, 0.7 to 1.2,
    but for the smallest."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if tall else matrix
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = found @ found.T
        found = torch.addmm(found, torch.addmm(square, square, square, beta=b, alpha=c), found, beta=a)
    return found.T if tall else found
