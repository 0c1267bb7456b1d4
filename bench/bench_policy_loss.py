"""policy_loss: logits [N, V] to the clipped loss of every row and its gradient in the logits, in
one go.

Bytes, e = bytes of a logit: read N V e, write N V e; the second read, for the gradient, can come
from the cache. The [N] vectors are below a thousandth of that. Without a gradient: read N V e.
Operations a logit: as token_logprob's, ten.
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

CLIP = {"low": 0.8, "high": 1.28}
LABEL = "loss + gradient"
SIZES = {
    "cpu": [Size(label=LABEL, shape={"N": 64, "V": 8192})],
    "cuda": [
        Size(label=LABEL, shape={"N": 8192, "V": 151936}, dtype=torch.bfloat16),
        Size(label=LABEL, shape={"N": 4096, "V": 151936}),
    ],
}


def eager_terms(logits: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """(loss, logp, entropy, ratio) [N] as a trainer writes them, in float32."""
    logps = logits.float().log_softmax(-1)
    logp = logps.gather(1, rows["targets"][:, None])[:, 0]
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1)
    ratio = (logp - rows["old_logp"]).exp()
    advantages = rows["advantages"]
    clipped = ratio.clamp(CLIP["low"], CLIP["high"])
    objective = -torch.minimum(ratio * advantages, clipped * advantages)
    return rows["weights"] * objective, logp, entropy, ratio


def eager(rows: dict[str, Tensor]) -> tuple[Tensor, ...]:
    leaf = rows["logits"].detach().requires_grad_()
    terms = eager_terms(leaf, rows)
    (dlogits,) = torch.autograd.grad(terms[0].sum(), leaf)
    return *(term.detach() for term in terms), dlogits


def case(size: Size, device: torch.device) -> Case:
    n, v = size.shape["N"], size.shape["V"]
    rows = policy_rows(n, v, size.dtype, device)
    kernels = launchers(implementation_on(device))

    def ours(_: int, dlogits: Tensor | None = None) -> tuple[Tensor, ...]:
        dlogits = torch.empty_like(rows["logits"]) if dlogits is None else dlogits
        out = kernels.policy_loss(**rows, **CLIP, dlogits=dlogits)
        return out.loss, out.logp, out.entropy, out.ratio, dlogits

    def check() -> None:
        got = ours(0, torch.full_like(rows["logits"], torch.nan))
        assert got[-1].isfinite().all(), "d(logits) has entries that were not written"
        part = checked_rows(n, device)
        few = {name: value[part] for name, value in rows.items()}
        exact = {
            name: value.double() if value.is_floating_point() else value
            for name, value in few.items()
        }
        leaf = exact["logits"].requires_grad_()
        truth = reference.policy_loss(**exact, **CLIP)
        (gradient,) = torch.autograd.grad(truth.loss.sum(), leaf)
        oracle = (truth.loss, truth.logp, truth.entropy, truth.ratio, gradient)
        names = ("loss", "logp", "entropy", "ratio", "dlogits")
        for name, mine, same, right in zip(names, got, eager(few), oracle, strict=True):
            assert_right(mine[part], same, right, name=name)

    moved = 2 * rows["logits"].numel() * rows["logits"].element_size()
    return Case(
        op="policy_loss",
        size=size,
        columns={
            "ours": ours,
            "eager": lambda _: eager(rows),
            "ceiling": copy_ceiling(moved, device),
        },
        check=check,
        bytes=moved,
        flops=10 * rows["logits"].numel(),
    )


def test_policy_loss(benchmark, size, column, device):
    benchmark_column(benchmark, case(size, device), column, device)
