"""What a caller passes, as flat rows, or an InputError that names the argument.

Padded [S, L] and packed [T] become the same thing: `N` rows, and where anything is per sequence,
`Segments`.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .config import LossConfig
from .errors import InputError
from .objective import Segments, token_weights

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class LossRows:
    """One call's tokens, flat: every tensor is [N], float32 (float64 for float64 input)."""

    shape: torch.Size
    """Shape of `targets` as given, and so of `logprobs` and `entropy`."""
    targets: Tensor
    """0 where masked."""
    mask: Tensor
    advantages: Tensor
    weights: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    sampler_logp: Tensor | None
    segments: Segments | None


def shape_error(name: str, tensor: Tensor, expected: str) -> InputError:
    return InputError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} is {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
        kinds = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
        raise InputError(
            f"{name} is {tensor.layout} {tensor.dtype}, expected a dense tensor of {kinds}"
        )


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise InputError(
            f"{name} is on {tensor.device}, expected {device}: move it with .to({str(device)!r})"
        )


def check_targets(targets: Tensor, expected: torch.Size, device: torch.device, name: str) -> None:
    """targets must be integer ids shaped `expected` (named `name` in the message) on `device`."""
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int32, torch.int64):
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise InputError(f"targets is {kind}, expected an int64 or int32 tensor of token ids")
    if targets.shape != expected:
        raise shape_error("targets", targets, f"{tuple(expected)} like {name}")
    check_device("targets", targets, device)


def check_ids(targets: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    """Live ids must lie in the vocabulary. Looked at on a CPU only: on a GPU such a row gives NaN
    instead of a sync."""
    if targets.device.type != "cpu":
        return
    bad = (targets < 0) | (targets >= vocabulary)
    bad = bad if mask is None else bad & mask
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise InputError(
            f"targets{list(where)} = {int(targets[where])} is outside [0, {vocabulary}): "
            "mask that position (mask = 0) or fix the token ids"
        )


def check_temperature(temperature: float | Tensor, targets: Tensor) -> float | Tensor:
    """A positive number, or a tensor shaped like targets, which comes back flat and float32."""
    if isinstance(temperature, Tensor):
        if temperature.shape != targets.shape:
            raise shape_error(
                "temperature", temperature, f"{tuple(targets.shape)} like targets, or a float"
            )
        check_device("temperature", temperature, targets.device)
        return temperature.detach().reshape(-1).float()
    if not (
        isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0
    ):
        raise InputError(f"temperature = {temperature!r}, expected a finite number > 0")
    return float(temperature)


def read_mask(mask: Tensor | None, targets: Tensor) -> Tensor:
    """1 = counts, 0 = masked, in any dtype, shaped like targets -> bool."""
    if mask is None:
        return torch.ones(targets.shape, dtype=torch.bool, device=targets.device)
    if not isinstance(mask, Tensor) or mask.shape != targets.shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"mask has shape {found}, expected {tuple(targets.shape)} like targets")
    check_device("mask", mask, targets.device)
    if mask.dtype == torch.bool:
        return mask
    # A float mask is rare and may hold fractions, so it is worth a sync; integers are looked at on
    # a CPU only.
    if mask.is_floating_point() or mask.device.type == "cpu":
        bad = (mask != 0) & (mask != 1)
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            raise InputError(f"mask must be 0 or 1, found {mask[where].item()} at {list(where)}")
    return mask != 0


def _per_token(
    name: str, tensor: Tensor | None, targets: Tensor, dtype: torch.dtype
) -> Tensor | None:
    if tensor is None:
        return None
    check_float(name, tensor)
    if tensor.shape != targets.shape:
        raise shape_error(name, tensor, f"{tuple(targets.shape)} like targets")
    check_device(name, tensor, targets.device)
    if tensor.requires_grad:
        raise InputError(f"{name} requires grad, expected constants: pass {name}.detach()")
    return tensor.reshape(-1).to(dtype)


def _segments(
    cu_seqlens: Tensor | None, targets: Tensor, mask: Tensor, dtype: torch.dtype
) -> Segments | None:
    """Sequence bounds of padded rows, or of packed ones when cu_seqlens is given."""
    rows = targets.numel()
    if targets.dim() == 2:
        if cu_seqlens is not None:
            raise InputError(
                "cu_seqlens goes with packed targets [T], found padded targets [S, L]: leave it out"
            )
        sequences, length = targets.shape
        cu_seqlens = torch.arange(sequences + 1, device=targets.device) * length
    elif cu_seqlens is None:
        return None
    else:
        _check_cu_seqlens(cu_seqlens, rows, targets.device)
        sequences = cu_seqlens.numel() - 1
    spans = torch.diff(cu_seqlens).long()
    ids = torch.arange(sequences, device=targets.device).repeat_interleave(spans, output_size=rows)
    lengths = torch.zeros(sequences, dtype=dtype, device=targets.device)
    lengths.index_add_(0, ids, mask.reshape(-1).to(dtype))
    return Segments(cu_seqlens, ids, lengths)


def _check_cu_seqlens(cu_seqlens: Tensor, rows: int, device: torch.device) -> None:
    integer = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in (torch.int32, torch.int64)
    if not integer or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise InputError(
            "cu_seqlens must be an int32 or int64 tensor [S+1] of offsets that starts at 0"
        )
    check_device("cu_seqlens", cu_seqlens, device)
    if device.type != "cpu":
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != rows:
        raise InputError(
            f"cu_seqlens goes from {offsets[0]} to {offsets[-1]}, expected from 0 to {rows}, the "
            "number of targets"
        )
    for index, (start, end) in enumerate(pairwise(offsets)):
        if end < start:
            raise InputError(
                f"cu_seqlens[{index + 1}] = {end} is below cu_seqlens[{index}] = {start}: sort it"
            )


def _advantages(
    advantages: Tensor, targets: Tensor, segments: Segments | None, dtype: torch.dtype
) -> Tensor:
    """[S] per sequence or shaped like targets -> one a row."""
    check_float("advantages", advantages)
    check_device("advantages", advantages, targets.device)
    if advantages.requires_grad:
        raise InputError("advantages requires grad, expected constants: pass advantages.detach()")
    if advantages.shape == targets.shape:
        return advantages.reshape(-1).to(dtype)
    if segments is not None and advantages.shape == segments.lengths.shape:
        return segments.spread(advantages.to(dtype))
    forms = f"{tuple(targets.shape)} like targets"
    if segments is not None:
        forms = f"{tuple(segments.lengths.shape)} (one a sequence) or {forms}"
    elif advantages.dim() == 1:
        forms += ", or cu_seqlens beside it to give one a sequence"
    raise shape_error("advantages", advantages, forms)


def _check_finite(name: str, values: Tensor, mask: Tensor, shape: torch.Size) -> None:
    if values.device.type == "cpu":
        bad = ~values.isfinite() & mask.reshape(-1)
        if bad.any():
            index = int(bad.nonzero()[0])
            where = torch.unravel_index(torch.tensor(index), shape)
            raise InputError(
                f"{name} at token {[int(i) for i in where]} is {values[index].item()}, expected a "
                "finite number: "
                "leave completions that could not be scored out with advantage 0"
            )


def loss_rows(
    targets: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    denominator: float | Tensor | None,
    config: LossConfig,
    vocabulary: int,
    dtype: torch.dtype,
) -> LossRows:
    """Check and flatten the per-token and per-sequence arguments of a loss call."""
    live = read_mask(mask, targets)
    check_ids(targets, live, vocabulary)
    segments = _segments(cu_seqlens, targets, live, dtype)
    needs = {
        "loss_type 'grpo'": config.loss_type == "grpo",
        "loss_type 'dr_grpo' without denominator": config.loss_type == "dr_grpo"
        and denominator is None,
        "importance_sampling_level 'sequence'": config.importance_sampling_level == "sequence",
    }
    for what, needed in needs.items():
        if needed and segments is None:
            raise InputError(
                f"{what} works per sequence: pass cu_seqlens [S+1] with packed targets [T]"
            )
    if (
        config.loss_type == "dr_grpo"
        and denominator is None
        and config.max_completion_length is None
    ):
        raise InputError(
            "loss_type 'dr_grpo' divides by max_completion_length: set it in LossConfig, or "
            "denominator"
        )
    if config.beta and ref_logprobs is None:
        raise InputError(
            f"beta = {config.beta} needs ref_logprobs {tuple(targets.shape)}: pass them or set "
            "beta = 0"
        )
    per_row = _advantages(advantages, targets, segments, dtype)
    _check_finite("advantages", per_row, live, targets.shape)
    flat = live.reshape(-1)
    denominator = _denominator(denominator, targets.device)
    weights = token_weights(flat, config, segments=segments, denominator=denominator, dtype=dtype)
    zeros = torch.zeros((), dtype=dtype, device=targets.device)

    def masked(name: str, tensor: Tensor | None) -> Tensor | None:
        values = _per_token(name, tensor, targets, dtype)
        return None if values is None else torch.where(flat, values, zeros)

    return LossRows(
        shape=targets.shape,
        targets=torch.where(flat, targets.reshape(-1), 0),
        mask=flat,
        advantages=torch.where(flat, per_row, zeros),
        weights=weights,
        old_logp=masked("old_logprobs", old_logprobs),
        ref_logp=masked("ref_logprobs", ref_logprobs),
        sampler_logp=masked("sampler_logprobs", sampler_logprobs),
        segments=segments,
    )


def _denominator(denominator: float | Tensor | None, device: torch.device) -> float | Tensor | None:
    if denominator is None:
        return None
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise shape_error("denominator", denominator, "one number")
        if denominator.device.type == "cpu":
            denominator = denominator.item()
        else:
            return denominator.detach().reshape(()).to(device)
    if not (math.isfinite(denominator) and denominator > 0):
        raise InputError(
            f"denominator = {denominator}, expected a finite number > 0: the normaliser of the step"
        )
    return float(denominator)
