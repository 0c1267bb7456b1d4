"""A head sharded over 2 and 4 gloo processes against the same call in one process."""

import datetime
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from grpo_fast import InputError, LossConfig, linear_grpo_loss
from grpo_fast.testing import random_sequences
from grpo_fast.vocab_parallel import Shard

S, L, D, V = 3, 5, 8, 37
# Uneven, and with one rank that has a single entry.
CUTS = {2: (0, 20, V), 4: (0, 9, 10, 30, V)}
CONFIGS = {
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "temperature": 0.8},
    "gspo": {"loss_type": "gspo"},
    "kl": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True},
    "entropy": {"loss_type": "dapo", "entropy_coef": 0.1, "top_entropy_quantile": 0.5},
}


def batch_of(dtype: torch.dtype) -> dict:
    batch = random_sequences(S, L, D, V, dtype)
    # One confident token: its log-prob must not drown in the sum over ranks.
    batch["hidden"][1, 0] = 8 * batch["weight"][int(batch["targets"][1, 0].clamp(min=0))]
    return batch | {"bias": torch.linspace(-1, 1, V, dtype=dtype)}


def join(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )


def run_ranks(task: str, ranks: int, store) -> list[str]:
    """What each process prints that runs this file's function `task`."""
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, task, str(rank), str(ranks), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [run.communicate(timeout=120) for run in runs]
    for run, (_, errors) in zip(runs, said, strict=True):
        assert run.returncode == 0, errors
    return [out for out, _ in said]


def call(batch: dict, config: LossConfig, part: slice = slice(None), **extra):
    """(output, gradients of hidden, weight rows `part`, bias `part`)."""
    leaves = {
        "hidden": batch["hidden"].clone().requires_grad_(),
        "weight": batch["weight"][part].clone().requires_grad_(),
        "bias": batch["bias"][part].clone().requires_grad_(),
    }
    names = ("targets", "advantages", "mask", "old_logprobs")
    names += ("ref_logprobs",) if config.beta else ()
    output = linear_grpo_loss(
        **leaves, **{name: batch[name] for name in names}, config=config, impl="torch", **extra
    )
    (2 * output.loss).backward()
    return output, [leaf.grad for leaf in leaves.values()]


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    scale = expected.double().abs().max().clamp(min=1e-30)
    return bool((got.double() - expected.double()).abs().max() <= tolerance * scale)


def compare(rank: int, ranks: int) -> None:
    """Run in each process: every config and dtype, and a DTensor head."""
    part = slice(CUTS[ranks][rank], CUTS[ranks][rank + 1])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        batch = batch_of(dtype)
        for name, options in CONFIGS.items():
            config = LossConfig(**options)
            whole, (dhidden, dweight, dbias) = call(batch, config)
            mine, grads = call(batch, config, part, process_group=dist.group.WORLD)
            for field in ("loss", "logprobs", "entropy"):
                got, expected = getattr(mine, field).detach(), getattr(whole, field).detach()
                assert close(got, expected, torch.float32 if dtype.itemsize < 4 else dtype), name
            mass = mine.tokens.gradient_mass, whole.tokens.gradient_mass
            assert close(*mass, torch.float32 if dtype.itemsize < 4 else dtype), name
            for got, expected in zip(grads, (dhidden, dweight[part], dbias[part]), strict=True):
                assert close(got, expected, dtype), (name, dtype)
    tensor_parallel(ranks)


def tensor_parallel(ranks: int) -> None:
    """The head as PyTorch's own tensor parallelism leaves it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    batch, config = batch_of(torch.float32), LossConfig(loss_type="dapo")
    mesh = init_device_mesh("cpu", (ranks,))
    names = ("hidden", "targets", "advantages", "mask", "old_logprobs")
    rows = {name: batch[name] for name in names}
    plain = batch["weight"].clone().requires_grad_()
    linear_grpo_loss(**rows, weight=plain, config=config).loss.backward()
    ops = [linear_grpo_loss]
    if ranks == 2:
        ops.append(torch.compile(linear_grpo_loss, fullgraph=True, backend="aot_eager"))
    for op in ops:
        weight = distribute_tensor(batch["weight"], mesh, [Shard(0)]).requires_grad_()
        op(**rows, weight=weight, config=config).loss.backward()
        assert close(weight.grad.full_tensor(), plain.grad, torch.float32)
    whole = distribute_tensor(batch["weight"], mesh, [Replicate()])
    with pytest.raises(InputError, match=r"weight has placements .*expected \(Shard\(dim=0\),\)"):
        linear_grpo_loss(**rows, weight=whole, config=config)


@pytest.mark.parametrize("ranks", CUTS)
def test_a_sharded_head_gives_the_whole_heads_result(ranks, tmp_path):
    run_ranks("compare", ranks, tmp_path / "store")


def count_numbers(rank: int, ranks: int) -> None:
    """Prints how many numbers each reduction of one call moves."""
    numbers, reduce = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        numbers.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    part = slice(CUTS[ranks][rank], CUTS[ranks][rank + 1])
    call(batch_of(torch.float32), LossConfig(), part, process_group=dist.group.WORLD)
    print(*numbers)


def test_ranks_exchange_a_few_numbers_a_token(tmp_path):
    """The shards' sizes, one maximum, five sums and d(hidden): nothing grows with V."""
    live = int(batch_of(torch.float32)["mask"].sum())
    for said in run_ranks("count_numbers", 2, tmp_path / "store"):
        assert [int(word) for word in said.split()] == [2, live, 5 * live, S * L * D]


def test_targets_of_other_ranks_are_not_read():
    shard = Shard(None, start=10, size=5, vocabulary=37)
    place, here = shard.local(torch.tensor([9, 10, 14, 15]))
    assert place.tolist() == [0, 0, 4, 0]
    assert here.tolist() == [False, True, True, False]


if __name__ == "__main__":
    task, rank, ranks, store = sys.argv[1:]
    join(int(rank), int(ranks), store)
    globals()[task](int(rank), int(ranks))
    dist.destroy_process_group()
