"""Our Muon beside torch's own."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from node.muon import Float32Muon, orthogonal

STEPS = 6
RULES = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


def trained(optimizer, shape):
    """A matrix after some steps on gradients that are the same for whoever asks."""
    luck = torch.Generator().manual_seed(3)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=luck))
    muon = optimizer([parameter], **RULES)
    for _ in range(STEPS):
        parameter.grad = torch.randn(shape, generator=luck)
        muon.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48)])
def test_it_makes_the_steps_of_torchs_own(shape):
    ours, theirs = (trained(each, shape) for each in (Float32Muon, torch.optim.Muon))
    start = trained(lambda parameters, **_: torch.optim.SGD(parameters, lr=0.0), shape)
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm(), "bfloat16 has three digits"


def test_what_is_orthogonal_afterwards_has_singular_values_of_about_one():
    matrix = torch.randn(40, 20, generator=torch.Generator().manual_seed(5))
    values = torch.linalg.svdvals(orthogonal(matrix, (3.4445, -4.7750, 2.0315), steps=5))
    assert values.min() > 0.6 and values.max() < 1.3


def test_it_never_calculates_in_bfloat16():
    seen = set()

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            seen.update(each.dtype for each in [found] if isinstance(each, torch.Tensor))
            return found

    with Spy():
        trained(Float32Muon, (8, 8))
    assert torch.float32 in seen and torch.bfloat16 not in seen
