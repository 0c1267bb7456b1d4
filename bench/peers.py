"""Who computes the loss from hidden states and head: one table, ours and the peers'.

Letters: `S` sequences of `L` tokens, `N = S L` rows, `D` hidden, `V` vocabulary. Everybody is asked
for the loss of CONFIG on the same batch, no token masked. A provider has it whole, or has
differentiable log-probs on which `clipped_loss` is put. A peer is imported from the user's
environment when it is first asked for; one that is not there is a named `Gap`.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grpo_fast import linear_grpo_loss, linear_logprob

from .inputs import linear_rows
from .provider import (
    CONFIG,
    SEQUENCES,
    LogProbs,
    Loss,
    Provider,
    clipped_loss,
    compiled,
    folder_of,
    module_at,
)

# What TRL's trainer passes.
TRL_VOCABULARY_CHUNK = 32768


class Batch(NamedTuple):
    """Row t of `hidden` predicts `targets[:, t]`; peers that shift are given what they expect."""

    hidden: Tensor
    """[S, L, D]."""
    weight: Tensor
    """[V, D]."""
    targets: Tensor
    """[S, L]."""
    advantages: Tensor
    """[S]."""
    old_logprobs: Tensor | None
    """[S, L]; None: the policy is its own, ratio 1."""

    def rows(self) -> dict[str, Tensor | None]:
        """The same as N rows."""
        old, length = self.old_logprobs, self.targets.shape[1]
        return {
            "hidden": self.hidden.flatten(0, 1),
            "weight": self.weight,
            "targets": self.targets.flatten(),
            "advantages": self.advantages.repeat_interleave(length),
            "old_logprobs": None if old is None else old.flatten(),
        }


def random_batch(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, **options
) -> Batch:
    """`linear_rows` of `shape` (N, D, V) as SEQUENCES of equal length."""
    rows = linear_rows(*shape, dtype, device, **options)
    return Batch(
        rows["hidden"].view(SEQUENCES, -1, shape[1]),
        rows["weight"],
        rows["targets"].view(SEQUENCES, -1),
        rows["advantages"][:SEQUENCES],
        rows["old_logprobs"].view(SEQUENCES, -1),
    )


class Calls(NamedTuple):
    logprobs: Callable[..., LogProbs] | None
    """(hidden [N, D], weight, targets [N], entropy: bool) -> LogProbs."""
    loss: Callable[[Batch], Loss]


def with_torch_loss(logprobs: Callable[..., LogProbs]) -> Calls:
    def loss(batch: Batch) -> Loss:
        flat, targets = batch.hidden.flatten(0, 1), batch.targets.flatten()
        logp = logprobs(flat, batch.weight, targets, entropy=False).logp
        return Loss(clipped_loss(logp, batch.rows()), logp)

    return Calls(logprobs, loss)


def ours(impl: str) -> Calls:
    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool) -> LogProbs:
        return LogProbs(*linear_logprob(hidden, weight, targets, return_entropy=entropy, impl=impl))

    def loss(batch: Batch) -> Loss:
        out = linear_grpo_loss(**batch._asdict(), config=CONFIG, impl=impl)
        return Loss(out.loss, out.logprobs.flatten())

    return Calls(logprobs, loss)


def eager(logits: torch.dtype | None, softmax: torch.dtype | None) -> Calls:
    """Logits and log-softmax in these dtypes; None is the inputs' own."""

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool) -> LogProbs:
        wide = nn.functional.linear(hidden.to(logits), weight.to(logits))
        logps = wide.log_softmax(-1, dtype=softmax)
        logp = logps.gather(1, targets[:, None])[:, 0].float()
        return LogProbs(logp, -(logps.exp() * logps).sum(-1) if entropy else None)

    return with_torch_loss(logprobs)


def compiled_eager() -> Calls:
    return Calls(None, compiled(eager(None, torch.float32).loss))


def trl() -> Calls:
    from trl.kernels import ChunkedLogProbFunction

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool) -> LogProbs:
        asked = ("entropy",) if entropy else ()
        options = (1.0, TRL_VOCABULARY_CHUNK, None, 1.0, asked)
        return LogProbs(*ChunkedLogProbFunction.apply(hidden, weight, None, targets, *options)[:2])

    return with_torch_loss(logprobs)


def liger() -> Calls:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        epsilon_low=CONFIG.epsilon,
        epsilon_high=CONFIG.clip_high,
        loss_type=CONFIG.loss_type,
    )

    def loss(batch: Batch) -> Loss:
        value, _ = module(
            batch.hidden,
            batch.weight,
            batch.targets,
            torch.ones_like(batch.targets),
            batch.advantages,
            old_per_token_logps=batch.old_logprobs,
            num_items_in_batch=batch.targets.numel(),
        )
        return Loss(value, None)

    return Calls(None, loss)


def liger_scaled() -> Calls:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool) -> LogProbs:
        found = Scaled.apply(hidden, weight, targets, 1.0, -100, 1, entropy)
        return LogProbs(-found[0], found[1]) if entropy else LogProbs(-found, None)

    return with_torch_loss(logprobs)


def verl() -> Calls:
    # By its path: importing the package starts Ray, and this file needs torch alone.
    path = folder_of("verl") / "utils/experimental/torch_functional.py"
    fused = module_at(path).FusedLinearForPPO()

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool) -> LogProbs:
        return LogProbs(*fused(hidden, weight, targets, temperature=1.0))

    return with_torch_loss(logprobs)


def verl_triton() -> Calls:
    # Packages without their own __init__, which starts Ray; the files below import one another.
    for name, folder in (("verl", "."), ("verl.utils", "utils")):
        if name not in sys.modules:
            sys.modules[name] = package = ModuleType(name)
            package.__path__ = [str(folder_of("verl") / folder)]
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool) -> LogProbs:
        return LogProbs(*linear_cross_entropy(hidden, weight, targets, 1.0))

    return with_torch_loss(logprobs)


def cut_cross_entropy() -> Calls:
    from cut_cross_entropy import linear_cross_entropy

    # Releases up to 25.1.1 have no such preset; there it is the plain one without the filter.
    presets = importlib.util.find_spec("cut_cross_entropy.cce_utils") is not None
    impl = {"cpu": "torch_compile", "cuda": "cce_exact" if presets else "cce"}

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool) -> LogProbs:
        options = {"reduction": "none", "filter_eps": None, "impl": impl[hidden.device.type]}
        return LogProbs(-linear_cross_entropy(hidden, weight, targets, **options).float(), None)

    return with_torch_loss(logprobs)


def unsloth() -> Calls:
    # By its path: importing the package patches torch and transformers, which the file, too, would
    # do to ask how much memory is free.
    path = folder_of("unsloth_zoo") / "fused_losses/fused_linear.py"
    sys.modules.setdefault("unsloth_zoo", None)
    fused = module_at(path).fused_linear_logprobs

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool) -> LogProbs:
        found = fused(hidden, weight, targets, return_entropy=entropy)
        return LogProbs(*found) if entropy else LogProbs(found, None)

    return with_torch_loss(logprobs)


def quack() -> Calls:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(batch: Batch) -> Loss:
        flat, targets = batch.hidden.flatten(0, 1), batch.targets.flatten()
        return Loss(chunked_linear_cross_entropy(flat, batch.weight, targets), None)

    return Calls(None, loss)


def torch_cross_entropy() -> Calls:
    options = nn.LinearCrossEntropyOptions()

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool) -> LogProbs:
        nll = nn.functional.linear_cross_entropy(
            hidden, weight, targets, reduction="none", options=options
        )
        return LogProbs(-nll.float(), None)

    return with_torch_loss(logprobs)


PROVIDERS = (
    Provider(
        name="grpo-fast torch",
        computes="the whole loss, a chunk of tokens at a time, gradient made in the forward",
        load=partial(ours, "torch"),
    ),
    Provider(
        name="grpo-fast triton",
        computes="the same by the Triton kernels; in Triton's interpreter without a GPU",
        load=partial(ours, "triton"),
        timed_on=("cuda",),
    ),
    Provider(
        name="grpo-fast reference",
        computes="the oracle's formula in the working dtype, logits in the inputs'",
        load=partial(ours, "reference"),
        timed_on=(),
    ),
    Provider(
        name="eager",
        computes="logits in the inputs' dtype, log-softmax in float32, loss in torch",
        load=partial(eager, None, torch.float32),
        package="torch",
    ),
    Provider(
        name="eager half",
        computes="logits and log-softmax in the inputs' dtype, loss in torch",
        load=partial(eager, None, None),
        package="torch",
        half_only=True,
    ),
    Provider(
        name="eager float32",
        computes="inputs widened to float32 first, loss in torch",
        load=partial(eager, torch.float32, None),
        package="torch",
        half_only=True,
    ),
    Provider(
        name="compiled eager",
        computes="eager by torch.compile, from head to loss",
        load=compiled_eager,
        package="torch",
        compiled_on=("cpu", "cuda"),
    ),
    Provider(
        name="TRL",
        computes="ChunkedLogProbFunction, 32768 vocabulary entries at a time, loss in torch",
        load=trl,
        package="trl",
    ),
    Provider(
        name="Liger",
        computes="LigerFusedLinearGRPOLoss(compiled=False), the whole loss, a sequence at a time",
        load=liger,
        package="liger-kernel",
    ),
    Provider(
        name="Liger ScaledCE",
        computes="LigerFusedLinearScaledCrossEntropyFunction (CPU: in torch), loss in torch",
        load=liger_scaled,
        package="liger-kernel",
    ),
    Provider(
        name="verl",
        computes="FusedLinearForPPO (its torch path), 512 tokens at a time, loss in torch",
        load=verl,
        package="verl",
    ),
    Provider(
        name="verl Triton",
        computes="linear_cross_entropy, its Triton kernels, entropy always made, loss in torch",
        load=verl_triton,
        package="verl",
        timed_on=("cuda",),
        needs_gpu=True,
    ),
    Provider(
        name="Cut Cross Entropy",
        computes="cce_exact, no entry left out (CPU: its torch_compile), loss in torch",
        load=cut_cross_entropy,
        package="cut-cross-entropy",
        compiled_on=("cpu",),
    ),
    Provider(
        name="unsloth",
        computes="fused_linear_logprobs, gradient in the forward for a frozen head, loss in torch",
        load=unsloth,
        package="unsloth-zoo",
    ),
    Provider(
        name="QuACK",
        computes="chunked_linear_cross_entropy, mean only: a bound on time, not the loss",
        load=quack,
        package="quack-kernels",
        bound=True,
        timed_on=("cuda",),
        needs_gpu=True,
    ),
    Provider(
        name="linear_cross_entropy",
        computes="torch.nn.functional.linear_cross_entropy, chunked, reduction none, loss in torch",
        load=torch_cross_entropy,
        package="torch",
    ),
)


class Gradients(NamedTuple):
    loss: Tensor
    logp: Tensor | None
    dhidden: Tensor
    """[N, D]."""
    dweight: Tensor | None
    """[V, D]; None for a frozen head."""


def gradients(calls: Calls, batch: Batch, *, frozen: bool = False) -> Gradients:
    """Forward and backward, as a training step has them."""
    hidden = batch.hidden.detach().requires_grad_()
    weight = batch.weight.detach().requires_grad_(not frozen)
    out = calls.loss(batch._replace(hidden=hidden, weight=weight))
    found = torch.autograd.grad(out.loss, (hidden,) if frozen else (hidden, weight))
    logp = None if out.logp is None else out.logp.detach()
    dweight = None if frozen else found[1]
    return Gradients(out.loss.detach(), logp, found[0].flatten(0, 1), dweight)
