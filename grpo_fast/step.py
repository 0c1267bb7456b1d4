"""Forward and backward of one optimizer step over groups, cut into micro-batches without changing
the result.

Shapes: `T` completion tokens of a micro-batch, `D` hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .loss_config import LossConfig
from .model import head, hidden_states
from .ops import LossOutput, linear_grpo_loss, linear_logprob
from .packing import Batch, Group, collate, micro_batches, per_completion


class StepOutput(NamedTuple):
    loss: Tensor
    """0-d, float32, no gradient: it went into the parameters."""
    logprobs: list[Tensor]
    """One tensor a completion, in group order."""
    entropy: list[Tensor]
    """Likewise, nats."""
    metrics: dict[str, Tensor]
    """Token-weighted over micro-batches, 0-d on the device."""


def grpo_backward(
    model,
    groups: Sequence[Group],
    *,
    loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
    token_budget: int = 16384,
    impl: str = "auto",
) -> StepOutput:
    """`linear_grpo_loss(...).loss.backward()` over all completions of `groups`, in micro-batches of
    `token_budget`.

    Gradients add up in `model.parameters()`. The normaliser is that of all groups together, so that
    neither the budget nor the order of completions changes the loss beyond rounding.
    """
    device = next(model.parameters()).device
    batches = [collate(groups, rows, device) for rows in micro_batches(groups, token_budget)]
    denominators = step_denominators(groups, batches, loss)
    total = torch.zeros((), device=device)
    outputs: list[LossOutput] = []
    for batch in batches:
        output = _micro_batch_loss(model, batch, loss, denominators, impl)
        output.loss.backward()
        total += output.loss.detach()
        outputs.append(output)
    return StepOutput(
        total,
        per_completion(groups, batches, [output.logprobs for output in outputs]),
        per_completion(groups, batches, [output.entropy for output in outputs]),
        merge_metrics([output.metrics for output in outputs]),
    )


def _micro_batch_loss(
    model, batch: Batch, loss: LossConfig, denominators: tuple[float, float], impl: str
) -> LossOutput:
    weight, bias = head(model)
    hidden = hidden_states(model, batch.input_ids)
    return linear_grpo_loss(
        hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.predictors),
        weight,
        batch.targets,
        batch.advantages,
        mask=batch.mask,
        cu_seqlens=batch.cu_seqlens,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        sampler_logprobs=batch.sampler_logprobs,
        bias=bias,
        group_ids=batch.group_ids,
        denominator=denominators[0],
        entropy_denominator=denominators[1],
        config=loss,
        impl=impl,
    )


@torch.no_grad()
def group_logprobs(
    model,
    groups: Sequence[Group],
    *,
    temperature: float = 1.0,
    token_budget: int = 16384,
    impl: str = "auto",
) -> list[Tensor]:
    """Log-probs of every completion under `model`, one tensor a completion in group order, without
    gradient."""
    device = next(model.parameters()).device
    weight, bias = head(model)
    batches = [collate(groups, rows, device) for rows in micro_batches(groups, token_budget)]
    values = []
    for batch in batches:
        hidden = hidden_states(model, batch.input_ids)
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.predictors)
        output = linear_logprob(
            rows, weight, batch.targets, bias=bias, temperature=temperature, impl=impl
        )
        values.append(output.logprobs)
    return per_completion(groups, batches, values)


def step_denominators(
    groups: Sequence[Group], batches: list[Batch], loss: LossConfig
) -> tuple[float, float]:
    """(`denominator`, `entropy_denominator`) of the whole step, as `linear_grpo_loss` means them;
    at least 1."""
    sequences = sum(len(group.completion_ids) for group in groups)
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    # The bonus acts on the tokens that each micro-batch's quantile keeps.
    acting = max(tokens * loss.top_entropy_quantile, 1.0)
    kind = loss.adds_up
    if kind == "token_mean":
        return max(tokens, 1), acting
    if kind == "prompt_mean":
        return max(len(groups), 1), acting
    if kind == "constant":
        assert loss.max_completion_length is not None
        return max(sequences * loss.max_completion_length, 1), acting
    return max(sequences, 1), acting


def merge_metrics(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The metrics of all tokens together: counts (`n_...`) add up, `*/min` and `*/max` stay
    extremes, means are weighted by the tokens they are of."""
    merged: dict[str, Tensor] = {}
    for name in sorted({name for part in parts for name in part}):
        having = [part for part in parts if name in part]
        values = torch.stack([part[name].float() for part in having])
        if name.startswith("n_"):
            merged[name] = values.sum()
        elif name.endswith(("/min", "/max")):
            merged[name] = values.amin() if name.endswith("/min") else values.amax()
        else:
            if name == "ratio/ess":
                # Its denominator is the mean square, which adds up.
                values = torch.stack([part["ratio/mean"] for part in having]).square() / values
            tokens = torch.stack([_measured(part, name) for part in having])
            merged[name] = (values * tokens).sum() / tokens.sum().clamp(min=1)
    if "ratio/ess" in merged:
        merged["ratio/ess"] = merged["ratio/mean"].square() / merged["ratio/ess"]
    return merged


def _measured(part: dict[str, Tensor], name: str) -> Tensor:
    """The tokens that the mean `name` is of."""
    tokens = part["n_tokens"] - part["n_tokens_skipped"]
    return tokens - part["n_tokens_unscorable"] if name.startswith("sampling/") else tokens
