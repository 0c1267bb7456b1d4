"""Once a model: a packed row must give what sequences give one by one, and one completion must not
see another.

A model that mixes tokens in a way that no interface tells (a convolution, a mask of its own) would
otherwise train on nonsense without an error.
"""

import dataclasses
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import using_packed_attention
from .errors import ConfigError
from .forward import forwarded
from .groups import Group
from .model import check_head, evaluating, hidden_states
from .packing import Packing, Part

# Relative difference of hidden states, packed and alone; a sequence that sees a neighbour is off by
# tenths. 16 bits differ by the order of their sums alone, through all layers.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2
# Enough to tell, and cheap beside a step.
MOST_TOKENS = 64
_checked: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()


def check_once(model, groups: Sequence[Group], packing: Packing, attention: str) -> None:
    """`check_head`, and `check_packing` on a small part of the first batch, once for each way
    `model` is used."""
    kind = next(model.parameters()).device.type
    done = _checked.setdefault(model, set())
    if "head" not in done:
        with torch.autocast(kind, enabled=False):
            check_head(model)
        done.add("head")
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    parts = [part for row in packing.rows for part in row]
    together = {part.group for part in parts if part.shared} | {c.group for c in packing.chunks}
    alone = {part.group for part in parts} - together
    for shared, indices in ((True, together), (False, alone)):
        chosen = [groups[g] for g in sorted(indices) if _tells(groups[g])][:2]
        if chosen and (way := (attention, shared, dtype, kind)) not in done:
            check_packing(model, chosen, attention=attention, shared=shared)
            done.add(way)


def _tells(group: Group) -> bool:
    """Whether a completion has a token that another one could see."""
    return any(len(completion) > 1 for completion in group.completion_ids)


@torch.no_grad()
def check_packing(model, groups: Sequence[Group], *, attention: str, shared: bool) -> None:
    """Raise ConfigError unless states of a packed row are those of each sequence alone, and moving
    one completion moves no bit of another's.

    With experts a few bits may move: how many tokens an expert gets decides how its sums are cut.
    """
    small = [_shortened(group) for group in groups]
    device = next(model.parameters()).device
    narrow = torch.is_autocast_enabled(device.type)

    def limit(states: Tensor) -> float:
        return HALF_TOLERANCE if narrow else TOLERANCE.get(states.dtype, HALF_TOLERANCE)

    with evaluating(model):
        packed = _packed_states(model, small, device, attention, shared)
        for (g, k), found in packed.items():
            error = _apart(found, _alone(model, small[g], k, device))
            if not error <= limit(found):
                raise ConfigError(
                    f"a packed row under attention '{attention}' gives {type(model).__name__} "
                    f"other hidden states than the sequence alone (completion {k}: {error:.1e} "
                    f"apart, allowed {limit(found):.0e}): its layers mix tokens in a way packed "
                    "attention does not compute; use another model, and please report this one"
                )
        moved = [_moved(model, group) for group in small]
        for (g, k), found in _packed_states(model, moved, device, attention, shared).items():
            error = _apart(found, packed[g, k]) if k else 0.0
            if not error <= (limit(found) if _has_experts(model) else 0.0):
                raise ConfigError(
                    f"in a packed row of {type(model).__name__} completion {k} changes when "
                    f"completion 0 does, by {error:.1e}: its layers mix the sequences of a row; "
                    "use another model, and please report this one"
                )


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _has_experts(model) -> bool:
    config = model.get_decoder().config
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any(getattr(config, name, None) for name in names)


def _moved(model, group: Group) -> Group:
    """With other tokens in its first completion."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, *others = group.completion_ids
    first = [(int(token) + 1) % vocabulary for token in first]
    return dataclasses.replace(group, completion_ids=[first, *others])


def _packed_states(model, groups, device, attention, shared) -> dict[tuple[int, int], Tensor]:
    """States that predict each completion, from one row of everything."""
    parts = []
    for g, group in enumerate(groups):
        everyone = tuple(range(len(group.completion_ids)))
        if shared:
            parts.append(Part(g, everyone, 0, True))
        else:
            parts += [Part(g, (k,), 0, False) for k in everyone]
    lengths = [0] * len(groups)
    with using_packed_attention(model):
        row, states = next(
            forwarded(model, groups, Packing(rows=[parts]), lengths, device, attention)
        )
    return {tuple(member): part for member, part in row.split(states)}


def _alone(model, group: Group, k: int, device: torch.device) -> Tensor:
    """The same states by the model's own attention."""
    ids = [*group.prompt_ids, *group.completion_ids[k][:-1]]
    states = hidden_states(model, torch.tensor([ids], device=device))[0]
    return states[len(group.prompt_ids) - 1 :]


def _shortened(group: Group) -> Group:
    """Its first three completions, all cut short."""
    completions = [list(c[:MOST_TOKENS]) for c in group.completion_ids if len(c)][:3]
    return Group(
        prompt_ids=group.prompt_ids,
        completion_ids=completions,
        advantages=[0.0] * len(completions),
    )
