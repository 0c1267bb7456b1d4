"""linear_grpo_loss and linear_logprob: from hidden states, logits never held.

Work in head products G = 2 N D V FLOP: log-probs 1G; loss with d(hidden) and d(weight) 3G. The
ceiling column is those bare products in the inputs' dtype, whose logits take N V entries.
"""

import torch
from torch import Tensor

from grpo_fast import LossConfig, linear_grpo_loss, linear_logprob, reference

from .inputs import CHUNK, linear_rows
from .timing import (
    Case,
    Size,
    assert_right,
    benchmark_column,
    checked_rows,
    implementation_on,
    matmul_ceiling,
)

LOGPROB, LOSS = "log-probs", "loss + gradient"
BFLOAT16 = {"dtype": torch.bfloat16}
SIZES = {
    "cpu": [
        Size(label=LOGPROB, shape={"N": 128, "D": 128, "V": 8192}),
        Size(label=LOSS, shape={"N": 128, "D": 128, "V": 8192}),
    ],
    "cuda": [
        Size(label=LOGPROB, shape={"N": 8192, "D": 1536, "V": 151936}, **BFLOAT16),
        Size(label=LOSS, shape={"N": 8192, "D": 896, "V": 151936}, **BFLOAT16),
        Size(label=LOSS, shape={"N": 8192, "D": 1536, "V": 151936}, **BFLOAT16),
        Size(label=LOSS, shape={"N": 4096, "D": 4096, "V": 131072}, **BFLOAT16),
    ],
}
CONFIG = LossConfig(loss_type="dapo", epsilon=0.2, epsilon_high=0.28)


def loss_gradients(rows: dict[str, Tensor], impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, logp, d(hidden), d(weight)); eager is `impl="reference"`: logits in the inputs' dtype,
    float32 after."""
    leaves = {name: rows[name].detach().requires_grad_() for name in ("hidden", "weight")}
    out = linear_grpo_loss(**(rows | leaves), config=CONFIG, impl=impl)
    return out.loss.detach(), out.logprobs, *torch.autograd.grad(out.loss, tuple(leaves.values()))


def exact_gradients(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in float64, by the oracle, a few rows at a time."""
    hidden, weight = (rows[name].double().requires_grad_() for name in ("hidden", "weight"))
    loss, logp = hidden.new_zeros(()), []
    for start in range(0, hidden.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        terms = reference.policy_loss(
            hidden[part] @ weight.t(),
            rows["targets"][part],
            rows["advantages"][part].double(),
            torch.full_like(rows["advantages"][part], 1 / hidden.shape[0], dtype=torch.float64),
            old_logp=rows["old_logprobs"][part].double(),
            epsilon=CONFIG.epsilon,
            epsilon_high=CONFIG.clip_high,
        )
        terms.loss.sum().backward()
        loss += terms.loss.sum().detach()
        logp.append(terms.logp.detach())
    return loss, torch.cat(logp), hidden.grad, weight.grad


def check_loss(rows: dict[str, Tensor], impl: str) -> None:
    got, same, right = (
        loss_gradients(rows, impl),
        loss_gradients(rows, "reference"),
        exact_gradients(rows),
    )
    # All of d(weight) would take minutes on the host: every target's row, and as many others.
    vocabulary = rows["weight"].shape[0]
    some = torch.cat([rows["targets"][:1024], checked_rows(vocabulary, rows["targets"].device)])
    for index, name in enumerate(("loss", "logp", "dhidden", "dweight")):
        triple = (got[index], same[index], right[index])
        if name == "dweight":
            triple = tuple(gradient[some] for gradient in triple)
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
    hidden, weight, targets = (rows[name] for name in ("hidden", "weight", "targets"))
    impl = implementation_on(device)
    if size.label == LOGPROB:

        @torch.no_grad()
        def run(impl: str) -> object:
            return linear_logprob(hidden, weight, targets, impl=impl)

        products = [(hidden, weight.t())]
    else:

        def run(impl: str) -> object:
            return loss_gradients(rows, impl)

        logits = hidden @ weight.t()
        products = [(hidden, weight.t()), (logits, weight), (logits.t(), hidden)]
    return Case(
        op="linear_logprob" if size.label == LOGPROB else "linear_grpo_loss",
        size=size,
        columns={
            "ours": lambda _: run(impl),
            "eager": lambda _: run("reference"),
            "ceiling": matmul_ceiling(products),
        },
        check=lambda: (check_logprob if size.label == LOGPROB else check_loss)(rows, impl),
        flops=len(products) * 2 * n * d * v,
    )


def test_linear_grpo(benchmark, size, column, device):
    benchmark_column(benchmark, case(size, device), column, device)
