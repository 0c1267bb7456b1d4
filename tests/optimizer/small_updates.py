"""What the tests of the optimizer share: N weights N(0, 0.02) that AdamW moves by 1e-6 a step, all
in one direction, for 100 steps.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from grpo_fast.checkpoint import optimizer_tensors
from grpo_fast.config import TrainConfig

RATE, STEPS, N = 1e-6, 100, 100_000
MOVED = RATE * STEPS
BF16_EPS = 2.0**-7
NEEDED = {"model": "m", "dataset": "d.jsonl", "reward": ("r.py:f",)}


def config_of(precision: str = "master", **changes) -> TrainConfig:
    options = {"dtype": "bfloat16", "update_precision": precision, "learning_rate": RATE}
    return TrainConfig(**NEEDED | options | changes)


def weights(count: int = N, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter((0.02 * torch.randn(count, generator=generator)).to(dtype))


def gradient(parameter: Tensor, step: int) -> Tensor:
    # Apart from the seed of the weights, or the first gradient would be the weights themselves.
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def run(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: range) -> None:
    for step in steps:
        parameter.grad = gradient(parameter, step).to(parameter.grad_dtype)
        optimizer.step()


def train_tiny(model, optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 40, (2, 8), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def nbytes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    """Bytes a number of a parameter, its gradient and all kept for it, besides the step count."""
    model = SimpleNamespace(named_parameters=lambda: [("p", parameter)])
    state = optimizer_tensors(model, optimizer)
    kept = [value.nbytes for name, value in state.items() if name != "p/step"]
    return (parameter.nbytes + parameter.grad.nbytes + sum(kept)) / parameter.numel()
