"""Who computes the loss from logits: one table, ours and the peers'.

Letters: `S` sequences of `L` tokens, `N = S L` rows, `V` vocabulary. As in `peers.py` everybody is
asked for the loss of CONFIG, no token masked, and for its gradient in the logits. Some make that in
the logits' own memory, so each call is given a copy of them, in the layout that it expects.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grpo_fast import grpo_loss

from .inputs import policy_rows
from .provider import CONFIG, SEQUENCES, Loss, Provider, clipped_loss, compiled


class LogitsBatch(NamedTuple):
    """`logits[:, t]` predict `targets[:, t]`."""

    logits: Tensor
    """[S, L, V]."""
    targets: Tensor
    """[S, L]."""
    advantages: Tensor
    """[S]."""
    old_logprobs: Tensor
    """[S, L]."""

    def rows(self) -> dict[str, Tensor]:
        """The same as N rows."""
        return {
            "logits": self.logits.flatten(0, 1),
            "targets": self.targets.flatten(),
            "advantages": self.advantages.repeat_interleave(self.targets.shape[1]),
            "old_logprobs": self.old_logprobs.flatten(),
        }


def random_logits(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> LogitsBatch:
    """`policy_rows` of `shape` (N, V) as SEQUENCES of equal length."""
    rows = policy_rows(*shape, dtype, device)
    return LogitsBatch(
        rows["logits"].view(SEQUENCES, -1, shape[1]),
        rows["targets"].view(SEQUENCES, -1),
        rows["advantages"][:SEQUENCES],
        rows["old_logp"].view(SEQUENCES, -1),
    )


class LogitsGradients(NamedTuple):
    loss: Tensor
    logp: Tensor | None
    """[N]; None where the provider keeps them to itself."""
    dlogits: Tensor
    """[S, L, V]."""


class LogitsCalls(NamedTuple):
    gradients: Callable[[LogitsBatch], LogitsGradients]
    """Forward and backward; the logits may be lost."""
    ready: Callable[[LogitsBatch], LogitsBatch] = lambda batch: batch._replace(
        logits=batch.logits.clone()
    )
    """What one call of `gradients` is given, made outside of what is timed."""


def by_autograd(loss: Callable[[LogitsBatch], Loss]) -> Callable[[LogitsBatch], LogitsGradients]:
    def gradients(batch: LogitsBatch) -> LogitsGradients:
        leaf = batch.logits.detach().requires_grad_()
        out = loss(batch._replace(logits=leaf))
        (dlogits,) = torch.autograd.grad(out.loss, leaf)
        logp = None if out.logp is None else out.logp.detach()
        return LogitsGradients(out.loss.detach(), logp, dlogits)

    return gradients


def with_torch_loss(
    logprobs: Callable[[Tensor, Tensor], Tensor], *, in_one: bool = False
) -> LogitsCalls:
    """From a function (logits [N, V], targets [N]) -> log-probs [N]; compiled with its loss where
    they are to be one."""

    def loss(batch: LogitsBatch) -> Loss:
        rows = batch.rows()
        logp = logprobs(rows["logits"], rows["targets"])
        return Loss(clipped_loss(logp, rows), logp)

    return LogitsCalls(by_autograd(compiled(loss) if in_one else loss))


def ours(impl: str, inplace: bool) -> LogitsCalls:
    def loss(batch: LogitsBatch) -> Loss:
        out = grpo_loss(**batch._asdict(), config=CONFIG, impl=impl, inplace=inplace)
        return Loss(out.loss, out.logprobs.flatten())

    return LogitsCalls(by_autograd(loss))


def eager(*, in_one: bool = False) -> LogitsCalls:
    def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
        logps = logits.log_softmax(-1, dtype=torch.float32)
        return logps.gather(1, targets[:, None])[:, 0]

    return with_torch_loss(logprobs, in_one=in_one)


def eager_logsumexp() -> LogitsCalls:
    def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
        wide = logits.float()
        return wide.gather(1, targets[:, None])[:, 0] - wide.logsumexp(-1)

    return with_torch_loss(logprobs)


def trl() -> LogitsCalls:
    from trl.kernels import selective_log_softmax_and_entropy

    return with_torch_loss(lambda *rows: selective_log_softmax_and_entropy(*rows)[0])


def liger() -> LogitsCalls:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(batch: LogitsBatch) -> Loss:
        value, _ = triton_grpo_loss(
            batch.logits,
            batch.old_logprobs,
            None,
            batch.targets,
            batch.advantages,
            temperature=1.0,
            beta=0.0,
            eps_low=CONFIG.epsilon,
            eps_high=CONFIG.clip_high,
            inplace=True,
            loss_type=CONFIG.loss_type,
            reduce=True,
            num_items_in_batch=batch.targets.numel(),
        )
        return Loss(value, None)

    def gradients(batch: LogitsBatch) -> LogitsGradients:
        found = by_autograd(loss)(batch)
        return found._replace(dlogits=found.dlogits[:, :-1])

    # It leaves out the last position of a sequence, whose logits predict nothing.
    return LogitsCalls(
        gradients,
        lambda batch: batch._replace(logits=nn.functional.pad(batch.logits, (0, 0, 0, 1))),
    )


def flash_attention() -> LogitsCalls:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return with_torch_loss(lambda *rows: -cross_entropy_loss(*rows, inplace_backward=True)[0])


def quack() -> LogitsCalls:
    from quack.cross_entropy import cross_entropy

    return with_torch_loss(
        lambda *rows: -cross_entropy(*rows, reduction="none", inplace_backward=True)
    )


def fast_llm() -> LogitsCalls:
    from fast_llm.functional.triton.grpo_loss import triton_grpo_loss_forward_backward

    def gradients(batch: LogitsBatch) -> LogitsGradients:
        rows = batch.rows()
        loss, dlogits, _ = triton_grpo_loss_forward_backward(
            rows["logits"],
            rows["targets"],
            rows["advantages"],
            rows["old_logprobs"],
            grad_output=1.0,
            epsilon_low=CONFIG.epsilon,
            epsilon_high=CONFIG.clip_high,
        )
        return LogitsGradients(loss, None, dlogits.view_as(batch.logits))

    return LogitsCalls(gradients)


LOGITS_PROVIDERS = (
    Provider(
        name="grpo-fast torch",
        computes="the whole loss, a chunk of rows at a time, gradient made in the forward",
        load=partial(ours, "torch", False),
    ),
    Provider(
        name="grpo-fast torch, in place",
        computes="the same, gradient in the logits' memory",
        load=partial(ours, "torch", True),
    ),
    Provider(
        name="grpo-fast triton",
        computes="one launch for loss and gradient; in Triton's interpreter without a GPU",
        load=partial(ours, "triton", False),
        timed_on=("cuda",),
    ),
    Provider(
        name="grpo-fast triton, in place",
        computes="the same, gradient in the logits' memory",
        load=partial(ours, "triton", True),
        timed_on=("cuda",),
    ),
    Provider(
        name="eager",
        computes="log-softmax in float32, loss in torch",
        load=eager,
        package="torch",
    ),
    Provider(
        name="eager logsumexp",
        computes="target logit less logsumexp in float32, loss in torch",
        load=eager_logsumexp,
        package="torch",
    ),
    Provider(
        name="compiled eager",
        computes="the same by torch.compile",
        load=partial(eager, in_one=True),
        package="torch",
        compiled_on=("cpu", "cuda"),
    ),
    Provider(
        name="TRL",
        computes="selective_log_softmax_and_entropy, its Triton kernels, loss in torch",
        load=trl,
        package="trl",
        timed_on=("cuda",),
    ),
    Provider(
        name="Liger",
        computes="triton_grpo_loss(inplace=True, reduce=True), the whole loss",
        load=liger,
        package="liger-kernel",
        timed_on=("cuda",),
    ),
    Provider(
        name="flash-attn",
        computes="its Triton cross_entropy_loss, gradient in place, loss in torch",
        load=flash_attention,
        package="flash-attn",
        timed_on=("cuda",),
        needs_gpu=True,
    ),
    Provider(
        name="QuACK",
        computes="cross_entropy(reduction='none'), gradient in place, loss in torch",
        load=quack,
        package="quack-kernels",
        timed_on=("cuda",),
        needs_gpu=True,
    ),
    Provider(
        name="Fast-LLM",
        computes="triton_grpo_loss_forward_backward, the whole loss in one launch",
        load=fast_llm,
        package="fast-llm",
        install="from git alone, ServiceNow/Fast-LLM, Python 3.12",
        timed_on=("cuda",),
        needs_gpu=True,
    ),
)
