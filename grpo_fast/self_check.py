"""Once a model: a packed row must give what sequences give one by one, and one completion must not
see another.

A model that mixes tokens in a way that no interface tells (a convolution, a mask of its own) would
otherwise train on nonsense without an error.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import using_packed_attention
from .errors import ConfigError
from .forward import forwarded
from .groups import Group
from .model import evaluating, hidden_states
from .packing import Packing, Part

# Relative difference of hidden states, packed and alone; a sequence that sees a neighbour is off by
# tenths. 16 bits differ by the order of their sums alone, through all layers.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2
# Enough to tell, and cheap beside a step.
MOST_TOKENS = 64
_checked: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()


def check_once(model, groups: Sequence[Group], packing: Packing, attention: str) -> None:
    """`check_packing` on a small part of the first batch, once for each way `model` is used."""
    shared = any(part.shared for row in packing.rows for part in row) or bool(packing.chunks)
    kind = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    way = (attention, shared, dtype, kind)
    done = _checked.setdefault(model, set())
    longest = [group for group in groups if any(len(c) > 1 for c in group.completion_ids)]
    if way in done or not longest:
        return
    check_packing(model, longest[:2], attention=attention, shared=shared)
    done.add(way)


@torch.no_grad()
def check_packing(model, groups: Sequence[Group], *, attention: str, shared: bool) -> None:
    """Raise ConfigError unless states of a packed row are those of each sequence alone, and moving
    one completion moves no bit of another's."""
    small = [_shortened(group) for group in groups]
    device = next(model.parameters()).device
    with evaluating(model):
        packed = _packed_states(model, small, device, attention, shared)
        for (g, k), found in packed.items():
            alone = _alone(model, small[g], k, device)
            error = float((found - alone).norm() / alone.norm())
            limit = TOLERANCE.get(found.dtype, HALF_TOLERANCE)
            if torch.is_autocast_enabled(device.type):
                limit = HALF_TOLERANCE
            if not error <= limit:
                raise ConfigError(
                    f"a packed row under attention '{attention}' gives {type(model).__name__} "
                    f"other hidden states than the sequence alone (completion {k}: {error:.1e} "
                    f"apart, allowed {limit:.0e}): its "
                    "layers mix tokens in a way packed attention does not compute; use another "
                    "model, and please report this one"
                )
        _check_leaks(model, small, packed, device, attention, shared)


def _check_leaks(model, groups, packed, device, attention, shared) -> None:
    """Other tokens in the first completion of each group change no bit of the others."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    moved = []
    for group in groups:
        first, *others = group.completion_ids
        first = [(int(token) + 1) % vocabulary for token in first]
        moved.append(
            Group(
                prompt_ids=group.prompt_ids,
                completion_ids=[first, *others],
                advantages=group.advantages,
            )
        )
    for (g, k), found in _packed_states(model, moved, device, attention, shared).items():
        if k and not torch.equal(found, packed[g, k]):
            raise ConfigError(
                f"in a packed row of {type(model).__name__} completion {k} changes when completion "
                "0 does: its layers mix the sequences of a row; use another model, and please "
                "report this one"
            )


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
