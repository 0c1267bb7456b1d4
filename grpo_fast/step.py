"""Forward and backward of one optimizer step over groups: packed rows, shared prompts, groups of
any size, and the same result however the step is cut.

Shapes: `T` tokens of a row, `N` completion tokens in the loss, `D` hidden.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .activation_checkpointing import checkpointing_layers
from .attention import using_packed_attention, window_of
from .collate import GroupOrder, Row, group_order
from .config import Checkpointing, Chunking, Sharing
from .errors import InputError
from .forward import forwarded
from .groups import Group
from .loss_config import LossConfig
from .memory import estimated_need, fastest_mode
from .model import Head, head
from .ops import LossOutput, linear_grpo_loss, linear_logprob
from .outputs import StepOutput, StepTokens, TokenOutput
from .packing import Packing, group_budget, pack
from .self_check import check_once


def grpo_backward(
    model,
    groups: Sequence[Group],
    *,
    loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
    token_budget: int | None = None,
    share_prompts: Sharing = "auto",
    chunking: Chunking = "auto",
    checkpointing: Checkpointing = "auto",
    denominator: float | Tensor | None = None,
    entropy_denominator: float | Tensor | None = None,
    attention: str = "auto",
    impl: str = "auto",
) -> StepOutput:
    """`linear_grpo_loss(hidden_states(model, sequences), ...).loss.backward()` over every
    completion of `groups`.

    Gradients add up in `model.parameters()`, as `loss.backward()` would add them. The completions
    lie in packed rows of at most `token_budget` tokens (None: 16,384, or what the longest sequence
    takes; on a CPU 2,048 behind the longest prompt); nothing is padded. With `share_prompts` the
    tokens of a prompt are forwarded once for its group: `auto` where that saves more than 15 % of
    the tokens, `on`, `off`. A group that no row can hold is cut, by `chunking`: `auto` forwards its
    prompt once and its completions row by row, so that memory depends on the budget and not on the
    group; `on` does so with every group that shares; `off` forwards the prompt again in every row.
    Completions that teach nothing are not forwarded (advantage 0 where nothing else makes a
    gradient, or fully masked; `LossConfig.skip_zero_advantage`) and still count in the normaliser,
    which is that of all groups together, or `denominator` and `entropy_denominator` as in
    `linear_grpo_loss`, so that calls over parts of a step add up to it. `checkpointing`: `on`
    computes every layer again in the backward instead of keeping it, `offload` also keeps what
    enters a layer in CPU memory, `off` keeps everything, `auto` is the first of off, on and offload
    that should fit (`plan_memory` measures instead). `attention`: a backend of `attention_choice`,
    `impl`: of the loss.

    model: a causal language model of transformers, or a peft LoRA model around one. Raises
    InputError for groups that do not fit together, ConfigError for a budget below the longest
    sequence and for a model whose layers or head do more than is computed here. Sources: 2402.03300
    (GRPO); the shared prompt is PrefixGrouper's idea (2506.05433), computed without copies.
    """
    device = next(model.parameters()).device
    if token_budget is None:
        token_budget = group_budget(groups, device)
    packing = pack(
        groups,
        loss,
        token_budget,
        sharing=share_prompts,
        chunking=chunking,
        window=window_of(model),
    )
    live = group_tokens(groups)
    if denominator is None or entropy_denominator is None:
        known = step_denominators(groups, live, loss)
        denominator = known[0] if denominator is None else denominator
        entropy_denominator = known[1] if entropy_denominator is None else entropy_denominator
    denominators = (denominator, entropy_denominator)
    layer = head(model)
    total = torch.zeros((), device=device)
    rows: list[Row] = []
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    made: list[TokenOutput] = []
    parts: list[dict[str, Tensor]] = []
    check_once(model, groups, packing, attention)
    mode = checkpointing
    if mode == "auto":
        mode = fastest_mode(device, partial(estimated_need, model), packing.longest)
    with using_packed_attention(model), checkpointing_layers(model, mode):
        for row, states in forwarded(model, groups, packing, live, device, attention):
            output = _row_loss(states, layer, row, loss, denominators, impl)
            output.loss.backward()
            total += output.loss.detach()
            rows.append(row)
            # Not the output itself: the graph behind its loss would keep the row's activations.
            logprobs.append(output.logprobs)
            entropies.append(output.entropy)
            made.append(output.tokens)
            parts.append(output.metrics)
            del output, states
    order = group_order(groups, rows, packing.dead, device)
    tokens = _step_tokens(order, logprobs, entropies, made, denominator)
    output = StepOutput(
        total,
        list(tokens.logprobs.split(order.lengths)),
        list(tokens.entropy.split(order.lengths)),
        merge_metrics(parts) | step_metrics(groups, packing, parts, token_budget, device),
    )
    output.tokens = tokens
    return output


def _step_tokens(
    order: GroupOrder,
    logprobs: Sequence[Tensor],
    entropies: Sequence[Tensor],
    made: Sequence[TokenOutput],
    denominator: float | Tensor,
) -> StepTokens:
    def each(name: str, dead: float = torch.nan) -> Tensor:
        return order.of([getattr(tokens, name) for tokens in made], dead=dead)

    measured = any(tokens.kl is not None for tokens in made)
    return StepTokens(
        logprobs=order.of(logprobs),
        entropy=order.of(entropies),
        ratio=each("ratio"),
        kl=each("kl") if measured else None,
        gradient_mass=each("gradient_mass"),
        slope=each("slope", dead=0.0),
        lengths=order.lengths,
        rows=order.rows,
        denominator=denominator,
    )


def _row_loss(
    states: Tensor,
    layer: Head,
    row: Row,
    loss: LossConfig,
    denominators: tuple[float | Tensor, float | Tensor],
    impl: str,
) -> LossOutput:
    return linear_grpo_loss(
        states,
        layer.weight,
        row.targets,
        row.advantages,
        mask=row.mask,
        cu_seqlens=row.cu_seqlens,
        old_logprobs=row.old_logprobs,
        ref_logprobs=row.ref_logprobs,
        sampler_logprobs=row.sampler_logprobs,
        bias=layer.bias,
        softcap=layer.softcap,
        logit_scale=layer.logit_scale,
        group_ids=row.group_ids,
        group_lengths=row.group_lengths,
        denominator=denominators[0],
        entropy_denominator=denominators[1],
        config=loss,
        impl=impl,
    )


def group_logprobs(
    model,
    groups: Sequence[Group],
    *,
    temperature: float = 1.0,
    token_budget: int | None = None,
    share_prompts: Sharing = "auto",
    chunking: Chunking = "auto",
    attention: str = "auto",
    impl: str = "auto",
) -> list[Tensor]:
    """`log_softmax(model(sequence).logits / temperature).gather(completion)` of every completion,
    one float32 tensor each in group order, without gradient.

    Packed, shared and cut like `grpo_backward`, but every completion is forwarded. For the
    reference policy of a LoRA run call it within `model.disable_adapter()`.
    """
    options = {"share_prompts": share_prompts, "chunking": chunking, "attention": attention}
    return group_measures(
        model, groups, temperature=temperature, token_budget=token_budget, impl=impl, **options
    ).logprobs


class GroupMeasures(NamedTuple):
    logprobs: list[Tensor]
    """One tensor a completion, in group order."""
    entropy: list[Tensor] | None
    """Likewise, nats; None unless asked for."""


@torch.no_grad()
def group_measures(
    model,
    groups: Sequence[Group],
    *,
    temperature: float,
    return_entropy: bool = False,
    token_budget: int | None = None,
    share_prompts: Sharing = "auto",
    chunking: Chunking = "auto",
    attention: str = "auto",
    impl: str = "auto",
) -> GroupMeasures:
    """`group_logprobs`, and the entropy of every token."""
    device = next(model.parameters()).device
    if token_budget is None:
        token_budget = group_budget(groups, device)
    packing = pack(
        groups,
        None,
        token_budget,
        sharing=share_prompts,
        chunking=chunking,
        window=window_of(model),
    )
    layer = head(model)
    rows, logprobs, entropies = [], [], []
    check_once(model, groups, packing, attention)
    with using_packed_attention(model):
        tokens = group_tokens(groups)
        for row, states in forwarded(model, groups, packing, tokens, device, attention):
            output = linear_logprob(
                states,
                layer.weight,
                row.targets,
                bias=layer.bias,
                softcap=layer.softcap,
                logit_scale=layer.logit_scale,
                temperature=temperature,
                return_entropy=return_entropy,
                impl=impl,
            )
            rows.append(row)
            logprobs.append(output.logprobs)
            entropies.append(output.entropy)
    order = group_order(groups, rows, packing.dead, device)

    def each(values: Sequence[Tensor]) -> list[Tensor]:
        return list(order.of(values).split(order.lengths))

    return GroupMeasures(each(logprobs), each(entropies) if return_entropy else None)


def group_tokens(groups: Sequence[Group]) -> list[int]:
    """Tokens in the loss of each group."""
    return [sum(map(group.live_tokens, range(len(group.completion_ids)))) for group in groups]


def step_denominators(
    groups: Sequence[Group], group_tokens: Sequence[int], loss: LossConfig
) -> tuple[float, float]:
    """(`denominator`, `entropy_denominator`) of the whole step, as `linear_grpo_loss` means them;
    at least 1."""
    sequences = sum(len(group.completion_ids) for group in groups)
    tokens = sum(group_tokens)
    # The bonus acts on the tokens that each row's quantile keeps.
    acting = max(tokens * loss.top_entropy_quantile, 1.0)
    kind = loss.adds_up
    if kind == "token_mean":
        return max(tokens, 1), acting
    if kind == "prompt_mean":
        return max(len(groups), 1), acting
    if kind == "constant":
        if loss.max_completion_length is None:
            raise InputError(
                f"loss_type '{loss.loss_type}' divides by max_completion_length: set it in "
                "LossConfig"
            )
        return max(sequences * loss.max_completion_length, 1), acting
    return max(sequences, 1), acting


def step_metrics(
    groups: Sequence[Group],
    packing: Packing,
    parts: Sequence[dict[str, Tensor]],
    token_budget: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """What was forwarded and what was left out: `batch/packing_ratio` is the tokens of one padded
    batch of everything over those forwarded, `batch/pad_frac` the padding's share of that batch."""
    forwarded_groups = {part.group for row in packing.rows for part in row}
    forwarded_groups |= {chunks.group for chunks in packing.chunks}
    rows = len(packing.rows) + sum(len(chunks.rows) for chunks in packing.chunks)
    padded = packing.tokens_padded
    full = sum(
        len(group.prompt_ids) + len(completion)
        for group in groups
        for completion in group.completion_ids
    )
    dead_tokens = sum(groups[g].live_tokens(k) for g, k in packing.dead)
    known = {
        "batch/forwarded_tokens_per_step": packing.tokens,
        "batch/microbatches_per_step": rows,
        "batch/pad_frac": 1 - full / padded if padded else 0.0,
        "batch/dropped_masked": len(packing.masked),
        "batch/dropped_zero_advantage": len(packing.dead),
        "groups/dead_frac": 1 - len(forwarded_groups) / len(groups) if groups else 0.0,
    }
    if rows:
        known["batch/packing_ratio"] = padded / packing.tokens
        known["batch/row_fill_frac"] = packing.tokens / (rows * token_budget)
    values = torch.tensor(list(known.values()), dtype=torch.float32, device=device).unbind()
    metrics = dict(zip(known, values, strict=True))
    for name in ("n_tokens", "n_tokens_skipped"):
        counted = [part[name] for part in parts]
        start = torch.tensor(float(dead_tokens), device=device)
        metrics[name] = sum(counted, start)
    return metrics


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
