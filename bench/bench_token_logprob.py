"""token_logprob: logits [N, V] and target ids [N] to log-prob, log-sum-exp and entropy, and back.

Bytes, e = bytes of a logit: forward reads N V e once; the gradient reads the logits once more and
writes as much, 3 N V e in all. The [N] vectors are below a thousandth of that. Operations a logit:
maximum, difference, exponential, sum, and two for the entropy; four more for the gradient.
"""

import torch
from torch import Tensor

from grpo_fast import reference
from grpo_fast.implementation import launchers

from .inputs import policy_rows
from .timing import (
    Case,
    Size,
    assert_right,
    benchmark_column,
    checked_rows,
    copy_ceiling,
    implementation_on,
)

FORWARD, BOTH = "forward", "forward + gradient"
SIZES = {
    "cpu": [
        Size(label=FORWARD, shape={"N": 64, "V": 8192}),
        Size(label=BOTH, shape={"N": 64, "V": 8192}),
    ],
    "cuda": [
        Size(label=FORWARD, shape={"N": 8192, "V": 151936}, dtype=torch.bfloat16),
        Size(label=BOTH, shape={"N": 8192, "V": 151936}, dtype=torch.bfloat16),
        Size(label=BOTH, shape={"N": 4096, "V": 151936}),
    ],
}


def eager(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What a trainer writes: float32 log-softmax, gathered; the entropy beside it."""
    logps = logits.float().log_softmax(-1)
    logp = logps.gather(1, targets[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1)
    return logp, entropy


def eager_gradient(logits: Tensor, targets: Tensor, dlogp: Tensor) -> tuple[Tensor, ...]:
    leaf = logits.detach().requires_grad_()
    logp, entropy = eager(leaf, targets)
    return logp.detach(), entropy, torch.autograd.grad(logp, leaf, dlogp)[0]


def case(size: Size, device: torch.device) -> Case:
    n, v = size.shape["N"], size.shape["V"]
    rows = policy_rows(n, v, size.dtype, device)
    logits, targets, dlogp = rows["logits"], rows["targets"], rows["advantages"]
    kernels = launchers(implementation_on(device))

    def ours_both(_: int, out: Tensor | None = None) -> tuple[Tensor, ...]:
        rows = kernels.token_logprob_fwd(logits, targets)
        dlogits = kernels.token_logprob_bwd(dlogp, None, logits, targets, rows.lse, None, out=out)
        return rows.logp, rows.entropy, dlogits

    def ours_forward(_: int) -> tuple[Tensor, ...]:
        out = kernels.token_logprob_fwd(logits, targets)
        return out.logp, out.entropy

    def check() -> None:
        got = ours_both(0, torch.full_like(logits, torch.nan))
        assert got[2].isfinite().all(), "d(logits) has entries that were not written"
        part = checked_rows(n, device)
        baseline = eager_gradient(logits[part], targets[part], dlogp[part])
        leaf = logits[part].double().requires_grad_()
        truth = reference.token_logprob(leaf, targets[part])
        (dlogits,) = torch.autograd.grad(truth.logp, leaf, dlogp[part].double())
        oracle = (truth.logp, truth.entropy, dlogits)
        for name, mine, same, exact in zip(
            ("logp", "entropy", "dlogits"), got, baseline, oracle, strict=True
        ):
            assert_right(mine[part], same, exact, name=name)

    passes = 1 if size.label == FORWARD else 3
    operations = (6 if size.label == FORWARD else 10) * logits.numel()
    moved = passes * logits.numel() * logits.element_size()
    if size.label == FORWARD:
        columns = {"ours": ours_forward, "eager": torch.no_grad()(lambda _: eager(logits, targets))}
    else:
        columns = {"ours": ours_both, "eager": lambda _: eager_gradient(logits, targets, dlogp)}
    return Case(
        op="token_logprob",
        size=size,
        columns=columns | {"ceiling": copy_ceiling(moved, device)},
        check=check,
        bytes=moved,
        flops=operations,
    )


def test_token_logprob(benchmark, size, column, device):
    benchmark_column(benchmark, case(size, device), column, device)
