"""Who computes the loss from hidden states and head: one table, ours and the peers'.

Letters: `S` sequences of `L` tokens, `N = S L` rows, `D` hidden, `V` vocabulary. Everybody is asked
for the loss of CONFIG on the same batch, no token masked. A provider has it whole, or has
differentiable log-probs on which `clipped_loss` is put. A peer is imported from the user's
environment when it is first asked for; one that is not there is a named `Gap`.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grpo_fast import LossConfig, linear_grpo_loss, linear_logprob

from .inputs import linear_rows

CONFIG = LossConfig(loss_type="dapo", epsilon=0.2, epsilon_high=0.28)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Liger goes a sequence at a time: few and long ones are the best it can be given.
SEQUENCES = 4
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


class LogProbs(NamedTuple):
    logp: Tensor
    """[N]."""
    entropy: Tensor | None
    """[N]; None where it was not asked for, or the provider has none."""


class Loss(NamedTuple):
    loss: Tensor
    logp: Tensor | None
    """[N]; None where the provider keeps them to itself."""


class Calls(NamedTuple):
    logprobs: Callable[..., LogProbs] | None
    """(hidden [N, D], weight, targets [N], entropy: bool) -> LogProbs."""
    loss: Callable[[Batch], Loss]


class Gap(Exception):
    """Why a provider has no number here, in one line."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    name: str
    computes: str
    load: Callable[[], Calls]
    """Imports what it needs. Sent to other processes, so a module's function or a partial of it."""
    package: str = "grpo-fast"
    """The distribution whose version is reported."""
    half_only: bool = False
    """In float32 it is what `eager` is."""
    timed_on: tuple[str, ...] = ("cpu", "cuda")
    """Device types where its time means something."""

    @property
    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def calls(self) -> Calls:
        """Import the provider; Gap where it is missing or broken. Ours has no excuse."""
        if self.package == "grpo-fast":
            return self.load()
        if self.version is None:
            raise Gap(f"{self.package} is not installed: pip install {self.package}")
        try:
            return self.load()
        except Exception as error:  # whatever a package does on import
            raise Gap(f"{self.package} {self.version} does not import: {said(error)}") from error


def said(error: BaseException) -> str:
    """An error of somebody else's code in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def clipped_loss(logp: Tensor, batch: Batch) -> Tensor:
    """CONFIG's loss in eager PyTorch, from log-probs [N]."""
    rows = batch.rows()
    old, advantages = rows["old_logprobs"], rows["advantages"]
    ratio = (logp - (logp.detach() if old is None else old)).exp()
    clipped = ratio.clamp(1 - CONFIG.epsilon, 1 + CONFIG.clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def with_torch_loss(logprobs: Callable[..., LogProbs]) -> Calls:
    def loss(batch: Batch) -> Loss:
        flat, targets = batch.hidden.flatten(0, 1), batch.targets.flatten()
        logp = logprobs(flat, batch.weight, targets, entropy=False).logp
        return Loss(clipped_loss(logp, batch), logp)

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


def verl() -> Calls:
    # Past sys.modules, where another test may have left a part of it.
    found = importlib.machinery.PathFinder.find_spec("verl")
    if found is None:
        raise ModuleNotFoundError("No module named 'verl'")
    # By its path: importing the package starts Ray, and this file needs torch alone.
    path = Path(found.submodule_search_locations[0], "utils/experimental/torch_functional.py")
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fused = module.FusedLinearForPPO()

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool) -> LogProbs:
        return LogProbs(*fused(hidden, weight, targets, temperature=1.0))

    return with_torch_loss(logprobs)


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
        name="verl",
        computes="FusedLinearForPPO (its torch path), 512 tokens at a time, loss in torch",
        load=verl,
        package="verl",
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
