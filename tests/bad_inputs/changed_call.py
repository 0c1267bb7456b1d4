"""What the tests of bad inputs share: one call of the loss, with some of its arguments changed.

One test a case: each is refused by name or gives what float64 gives. A: what goes into a loss. B:
its options. Values and gradients of good input are in test_losses.py.
"""

import math

import torch

from grpo_fast import LossConfig, linear_grpo_loss

S, L, D, V = 3, 4, 8, 37
IMPLS = ("torch", "triton")
NAN, INF = math.nan, math.inf


def call(batch: dict, *, impl: str = "auto", config: LossConfig | None = None, **changes):
    """(output, d(hidden), d(weight)) of `linear_grpo_loss` on the batch with `changes`."""
    given = {name: value for name, value in batch.items() if name != "ref_logprobs"} | changes
    for name in ("hidden", "weight"):
        given[name] = given[name].detach().clone().requires_grad_()
    output = linear_grpo_loss(**given, config=config or LossConfig(), impl=impl)
    grads = torch.autograd.grad(output.loss, (given["hidden"], given["weight"]))
    return output, *grads


def bits(*tensors: torch.Tensor) -> list[bytes]:
    return [tensor.detach().cpu().numpy().tobytes() for tensor in tensors]


def at(tensor: torch.Tensor, place: tuple, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed
