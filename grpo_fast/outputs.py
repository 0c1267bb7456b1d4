"""What the public ops and a step return."""

from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError


class TokenOutput(NamedTuple):
    """Per token, shaped like `targets`, 0 where masked, NaN where a row was skipped."""

    ratio: Tensor
    """Importance ratio of policy and old policy, at the level of the config."""
    kl: Tensor | None
    """To the reference, by the config's estimator; None without one."""
    gradient_mass: Tensor
    """|d(loss)/d(logp)| / temperature x sqrt((1 - p)^2 + sum of the other p^2): the norm of the
    token's row of d(loss) / d(logits), entropy bonus left out."""
    slope: Tensor
    """d(loss) / d(logp), entropy bonus left out; 0 where a row was skipped."""
    first_bad: Tensor
    """0-d int64: the first live token, counted through `targets`, whose log-prob is not finite; -1
    where there is none."""


class _LossFields(NamedTuple):
    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


class LossOutput(_LossFields):
    """`loss, logprobs, entropy, metrics = output`; only `loss` carries a gradient.

    loss: 0-d, float32. logprobs, entropy (nats): shaped like `targets`, float32, 0 where masked,
    NaN where `skip_zero_advantage` left a row out. metrics: 0-d tensors on the device; what was not
    measured has no entry. tokens: more per token.
    """

    tokens: TokenOutput

    def check(self) -> "LossOutput":
        """The output itself, or InputError naming the first token that spoils the loss.

        One sync: call it where the loss is read anyway. Until then nothing waits for the device.
        """
        place = int(self.tokens.first_bad)
        if place >= 0:
            shape = self.logprobs.shape
            where = [int(i) for i in torch.unravel_index(torch.tensor(place), shape)]
            raise InputError(
                f"log-prob of token {where} is {self.logprobs.reshape(-1)[place].item()}, expected "
                "a finite number: its target is outside the vocabulary or has a logit of -inf, or "
                "its row holds NaN; mask that position (mask = 0), or mend model or data"
            )
        return self


class _LogProbFields(NamedTuple):
    logprobs: Tensor
    entropy: Tensor | None


class LogProbOutput(_LogProbFields):
    """`logprobs, entropy = output`, shaped like `targets`, float32 (float64 for float64).

    entropy: nats; None unless asked for. lse: log-sum-exp of the logits over temperature, without a
    gradient.
    """

    lse: Tensor


class StepTokens(NamedTuple):
    """Per token of a step: [T], completion after completion in group order; 0 where masked, NaN for
    completions that were not forwarded. `ratio.split(lengths)` is one tensor a completion."""

    logprobs: Tensor
    entropy: Tensor
    ratio: Tensor
    """At the level of the config."""
    kl: Tensor | None
    """To the reference, by the config's estimator; None without one."""
    gradient_mass: Tensor
    """`TokenOutput.gradient_mass`."""
    slope: Tensor
    """`TokenOutput.slope`; 0 where not forwarded."""
    lengths: list[int]
    """Tokens of each completion."""
    rows: list[int]
    """The packed row of each completion, which quantiles are of; -1 where not forwarded."""
    denominator: float | Tensor
    """What `grpo_backward` was given, or found."""


class _StepFields(NamedTuple):
    loss: Tensor
    logprobs: list[Tensor]
    entropy: list[Tensor]
    metrics: dict[str, Tensor]


class StepOutput(_StepFields):
    """`loss, logprobs, entropy, metrics = output`.

    loss: 0-d, float32, no gradient: it went into the parameters. logprobs, entropy (nats): one
    tensor a completion, in group order; 0 where masked, NaN for completions that were not forwarded
    because they teach nothing. metrics: token-weighted over micro-batches, 0-d on the device;
    `batch/*` and `groups/dead_frac` say what was forwarded. tokens: more per token.
    """

    tokens: StepTokens
