"""Packed rows through the trunk: the states that predict completion tokens, a row at a time.

Shapes: `T` tokens of a row, `N` completion tokens in the loss, `D` hidden.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .attention import check_layers
from .collate import Row, collate, collate_chunk
from .groups import Group
from .layout import Layout, PromptLeaves, row_layout
from .model import hidden_states
from .packing import Chunks, Packing


def forwarded(
    model,
    groups: Sequence[Group],
    packing: Packing,
    group_lengths: Sequence[int],
    device: torch.device,
    attention: str = "auto",
) -> Iterator[tuple[Row, Tensor]]:
    """(row, states [N, D]) of everything in `packing`, one after the other.

    Take the gradient of a row's loss before asking for the next row: a prompt that is forwarded
    once for several rows has its backward, also once, behind the last of them.
    """
    for parts in packing.rows:
        row = collate(groups, parts, group_lengths, device, attention)
        yield row, PickStates.apply(_trunk(model, row), None, row.predictors)
    for chunks in packing.chunks:
        yield from _in_chunks(model, groups, chunks, group_lengths, device, attention)


def _in_chunks(
    model,
    groups: Sequence[Group],
    chunks: Chunks,
    group_lengths: Sequence[int],
    device: torch.device,
    attention: str,
) -> Iterator[tuple[Row, Tensor]]:
    """Keys, values and last state of the prompt are leaves while its completions are forwarded row
    by row; what gathers in them goes through the prompt at the end."""
    leaves = PromptLeaves(trained=torch.is_grad_enabled())
    prompt = torch.as_tensor(groups[chunks.group].prompt_ids, dtype=torch.long, device=device)
    layout = row_layout([len(prompt)], [], [], device, attention)
    layout.capture = leaves
    positions = torch.arange(len(prompt), device=device)
    last = _states(model, prompt[None], positions[None], layout)[-1:]
    # A leaf of at least float32: G first tokens add up in it.
    wide = torch.promote_types(last.dtype, torch.float32)
    leaf = last.detach().to(wide).requires_grad_(last.requires_grad)
    for completions in chunks.rows:
        row = collate_chunk(
            groups, chunks.group, completions, leaves, group_lengths, device, attention
        )
        # Completions of one token each have no tokens here: their prompt predicts them.
        alone = not row.input_ids.numel()
        states = last.new_zeros(0, last.shape[1]) if alone else _trunk(model, row)
        yield row, PickStates.apply(states, leaf, row.predictors)
    roots, gradients = leaves.roots()
    if leaf.grad is not None:
        roots.append(last)
        gradients.append(leaf.grad.to(last.dtype))
    if roots:
        torch.autograd.backward(roots, gradients)


def _trunk(model, row: Row) -> Tensor:
    return _states(model, row.input_ids, row.position_ids, row.layout)


def _states(model, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """[1, T] -> [T, D]."""
    hidden = hidden_states(model, input_ids, position_ids=position_ids, grpo_layout=layout)
    check_layers(model, layout)
    return hidden[0]


class PickStates(torch.autograd.Function):
    """`cat([states, last]).index_select(0, index)`: [T, D], [1, D] or None, [N] -> [N, D].

    The last state of a prompt predicts the first token of each completion: the gradients of all G
    of them add up in at least float32, where autograd would round after each.
    """

    @staticmethod
    def forward(ctx, states: Tensor, last: Tensor | None, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count, ctx.dtype, ctx.has_last = len(states), states.dtype, last is not None
        whole = states if last is None else torch.cat([states, last.to(states.dtype)])
        return whole.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        whole = grad.new_zeros(ctx.count + ctx.has_last, grad.shape[1], dtype=wide)
        whole.index_add_(0, index, grad.to(wide))
        last = whole[ctx.count :] if ctx.has_last else None
        return whole[: ctx.count].to(ctx.dtype), last, None
