"""group_advantage: rewards [S] of P groups to advantages [S], mean and standard deviation [P].

Bytes: rewards read and advantages written, 8 S; bounds, statistics and flags of the groups, 17 P.
Far below a launch's own cost at any size a trainer has: the ceiling column is that launch.
"""

import torch
from torch import Tensor

from grpo_fast import reference
from grpo_fast.implementation import launchers

from .inputs import generator_on
from .timing import (
    Case,
    Size,
    assert_right,
    benchmark_column,
    copy_ceiling,
    implementation_on,
    input_sets,
)

EPS = 1e-4
SIZES = {
    "cpu": [Size(label="groups", shape={"S": 4096, "G": 16})],
    "cuda": [Size(label="groups", shape={"S": 65536, "G": 64})],
}


def eager(rewards: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a trainer writes for groups of one size."""
    grouped = rewards.view(-1, group)
    mean, std = grouped.mean(1, keepdim=True), grouped.std(1, keepdim=True)
    return ((grouped - mean) / (std + EPS)).view(-1), mean[:, 0], std[:, 0]


def case(size: Size, device: torch.device) -> Case:
    s, group = size.shape["S"], size.shape["G"]
    moved = 8 * s + 17 * (s // group)
    sets = input_sets(moved, device)
    # Partial credit, so that groups differ and few are degenerate.
    rewards = torch.rand(sets, s, generator=generator_on(device, 0), device=device)
    offsets = torch.arange(0, s + 1, group, device=device)
    kernels = launchers(implementation_on(device))

    def ours(call: int) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.group_advantage(rewards[call % sets], offsets, eps=EPS)[:3]

    def check() -> None:
        ids = torch.arange(s) // group
        exact = rewards[0].double().cpu()
        truth = reference.group_advantage(exact, ids, eps=EPS)
        names = ("advantages", "mean", "std")
        for name, mine, same, right in zip(
            names, ours(0), eager(rewards[0], group), truth, strict=False
        ):
            assert_right(mine, same, right, name=name)

    return Case(
        op="group_advantage",
        size=size,
        columns={
            "ours": ours,
            "eager": lambda call: eager(rewards[call % sets], group),
            "ceiling": copy_ceiling(moved, device),
        },
        check=check,
        bytes=moved,
        # Mean, difference, square, sum, difference, quotient.
        flops=6 * s,
    )


def test_group_advantage(benchmark, size, column, device):
    benchmark_column(benchmark, case(size, device), column, device)
