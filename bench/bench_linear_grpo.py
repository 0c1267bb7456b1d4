"""linear_grpo_loss and linear_logprob: from hidden states, logits never held.

Work in head products G = 2 N D V FLOP: log-probs 1G; loss with d(hidden) and d(weight) 3G. The
ceiling column is those bare products in the inputs' dtype, whose logits take N V entries. Where
half of the rows teach nothing (advantage 0), their products are not in it.

Bytes: the weights once, or twice and their gradient once; hidden and its gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from grpo_fast import linear_grpo_loss, linear_logprob, reference

from .inputs import CHUNK, linear_rows
from .provider import CONFIG
from .timing import (
    Case,
    Size,
    assert_right,
    benchmark_column,
    checked_rows,
    implementation_on,
    matmul_ceiling,
)

LOGPROB, LOSS, HALF = "log-probs", "loss + gradient", "loss + gradient, half of the rows"
BFLOAT16 = {"dtype": torch.bfloat16}
SIZES = {
    "cpu": [
        Size(label=LOGPROB, shape={"N": 128, "D": 128, "V": 8192}),
        Size(label=LOSS, shape={"N": 128, "D": 128, "V": 8192}),
        Size(label=HALF, shape={"N": 128, "D": 128, "V": 8192}),
    ],
    "cuda": [
        Size(label=LOGPROB, shape={"N": 8192, "D": 1536, "V": 151936}, **BFLOAT16),
        Size(label=LOSS, shape={"N": 8192, "D": 896, "V": 151936}, **BFLOAT16),
        Size(label=LOSS, shape={"N": 8192, "D": 1536, "V": 151936}, **BFLOAT16),
        Size(label=LOSS, shape={"N": 4096, "D": 4096, "V": 131072}, **BFLOAT16),
        Size(label=HALF, shape={"N": 4096, "D": 4096, "V": 131072}, **BFLOAT16),
    ],
}


def eager_gradients(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a trainer writes: logits in the inputs' dtype, float32 after; no entropy, no metrics."""
    hidden, weight = (rows[name].detach().requires_grad_() for name in ("hidden", "weight"))
    logps = nn.functional.linear(hidden, weight).float().log_softmax(-1)
    logp = logps.gather(1, rows["targets"][:, None])[:, 0]
    ratio = (logp - rows["old_logprobs"]).exp()
    clipped = ratio.clamp(1 - CONFIG.epsilon, 1 + CONFIG.clip_high)
    loss = -torch.minimum(ratio * rows["advantages"], clipped * rows["advantages"]).mean()
    return loss.detach(), logp.detach(), *torch.autograd.grad(loss, (hidden, weight))


def loss_gradients(rows: dict[str, Tensor], impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, logp, d(hidden), d(weight)) of the public op."""
    leaves = {name: rows[name].detach().requires_grad_() for name in ("hidden", "weight")}
    out = linear_grpo_loss(**(rows | leaves), config=CONFIG, impl=impl)
    return out.loss.detach(), out.logprobs, *torch.autograd.grad(out.loss, tuple(leaves.values()))


class Exact(NamedTuple):
    """What the oracle says in float64; loss 0-d, [N], [N], [N, D], [V, D]."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    dhidden: Tensor
    dweight: Tensor


def oracle_terms(logits: Tensor, rows: dict[str, Tensor | None], part: slice):
    """The oracle's terms of a part of the rows, from their float64 logits; without `old_logprobs`
    on policy."""
    targets, old = rows["targets"][part], rows["old_logprobs"]
    return reference.grpo_loss(
        logits,
        targets,
        rows["advantages"][part].double(),
        mask=torch.ones_like(targets, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, len(targets)], device=targets.device),
        old_logp=None if old is None else old[part].double(),
        denominator=len(rows["targets"]),
        config=CONFIG,
    )


def exact_gradients(rows: dict[str, Tensor | None]) -> Exact:
    """The oracle a few rows at a time."""
    hidden, weight = (rows[name].double().requires_grad_() for name in ("hidden", "weight"))
    loss, logp, entropy = hidden.new_zeros(()), [], []
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        terms = oracle_terms(hidden[part] @ weight.t(), rows, part)
        terms.loss.sum().backward()
        loss += terms.loss.sum().detach()
        logp.append(terms.logp.detach())
        entropy.append(terms.entropy.detach())
    return Exact(loss, torch.cat(logp), torch.cat(entropy), hidden.grad, weight.grad)


def compared_rows(targets: Tensor, vocabulary: int) -> Tensor:
    """Rows of d(weight) held against the oracle, as all would take minutes on the host: every
    target's, and others evenly between."""
    return torch.cat([targets[:1024], checked_rows(vocabulary, targets.device)])


def check_loss(rows: dict[str, Tensor], impl: str) -> None:
    got, same, right = (
        loss_gradients(rows, impl),
        loss_gradients(rows, "reference"),
        exact_gradients(rows),
    )
    some = {
        "dweight": compared_rows(rows["targets"], rows["weight"].shape[0]),
        # A row that teaches nothing has no log-prob: it is not computed.
        "logp": rows["advantages"].nonzero()[:, 0],
    }
    for index, name in enumerate(("loss", "logp", "dhidden", "dweight")):
        triple = (got[index], same[index], getattr(right, name))
        if name in some:
            triple = tuple(part[some[name]] for part in triple)
        assert_right(*triple, name=name)


def check_logprob(rows: dict[str, Tensor], impl: str) -> None:
    part = checked_rows(rows["hidden"].shape[0], rows["hidden"].device)
    arguments = (rows["hidden"], rows["weight"], rows["targets"])
    few = (rows["hidden"][part], rows["weight"], rows["targets"][part])
    got = linear_logprob(*arguments, impl=impl).logprobs[part]
    same = linear_logprob(*few, impl="reference").logprobs
    logits = few[0].double() @ few[1].double().t()
    right = reference.token_logprob(logits, few[2]).logp
    assert_right(got, same, right, name="logp")


def case(size: Size, device: torch.device) -> Case:
    n, d, v = (size.shape[letter] for letter in "NDV")
    rows = linear_rows(n, d, v, size.dtype, device)
    entry = rows["hidden"].element_size()
    moved = (n * d + v * d) * entry
    if size.label == HALF:
        rows["advantages"][1::2] = 0
    hidden, weight, targets = (rows[name] for name in ("hidden", "weight", "targets"))
    impl = implementation_on(device)
    if size.label == LOGPROB:

        @torch.no_grad()
        def run(impl: str) -> object:
            return linear_logprob(hidden, weight, targets, impl=impl)

        products = [(hidden, weight.t())]
    else:

        def run(impl: str) -> object:
            return eager_gradients(rows) if impl == "reference" else loss_gradients(rows, impl)

        taught = hidden[::2].contiguous() if size.label == HALF else hidden
        logits = taught @ weight.t()
        products = [(taught, weight.t()), (logits, weight), (logits.t(), taught)]
        moved = (2 * n * d + 3 * v * d) * entry
    return Case(
        op="linear_logprob" if size.label == LOGPROB else "linear_grpo_loss",
        size=size,
        columns={
            "ours": lambda _: run(impl),
            "eager": lambda _: run("reference"),
            "ceiling": matmul_ceiling(products),
        },
        check=lambda: (check_logprob if size.label == LOGPROB else check_loss)(rows, impl),
        bytes=moved,
        flops=len(products) * 2 * len(products[0][0]) * d * v,
    )


def test_linear_grpo(benchmark, size, column, device):
    benchmark_column(benchmark, case(size, device), column, device)
