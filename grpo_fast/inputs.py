"""What a caller passes, as flat rows, or an InputError that names the argument.

Padded [S, L] and packed [T] become the same thing: `N` rows, and where anything is per sequence,
`Segments`.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from .aggregation import entropy_weights, token_weights
from .errors import InputError
from .loss_config import WHOLE_SEQUENCE, LossConfig
from .rows import LossRows, Segments

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def check_constant(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.requires_grad:
        raise InputError(f"{name} requires grad, expected constants: pass {name}.detach()")


def check_targets(targets: Tensor, expected: torch.Size, device: torch.device, name: str) -> None:
    """targets must be integer ids shaped `expected` (named `name` in the message) on `device`."""
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int32, torch.int64):
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise InputError(f"targets is {kind}, expected an int64 or int32 tensor of token ids")
    if targets.shape != expected:
        raise shape_error("targets", targets, f"{tuple(expected)} like {name}")
    check_device("targets", targets, device)


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    check_float("hidden", hidden)
    check_float("weight", weight)
    if hidden.dim() not in (2, 3):
        raise shape_error("hidden", hidden, "[S, L, D] padded or [T, D] packed")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise shape_error(
            "weight", weight, f"(V, {hidden.shape[-1]}) for hidden {tuple(hidden.shape)}"
        )
    check_device("weight", weight, hidden.device)
    if bias is not None:
        check_float("bias", bias)
        check_device("bias", bias, hidden.device)
        if bias.shape != weight.shape[:1]:
            raise shape_error("bias", bias, f"({weight.shape[0]},) like the rows of weight")
    check_targets(targets, hidden.shape[:-1], hidden.device, "hidden without its last dimension")


def check_logits(logits: Tensor, targets: Tensor) -> None:
    check_float("logits", logits)
    if logits.dim() not in (2, 3):
        raise shape_error("logits", logits, "[S, L, V] padded or [T, V] packed")
    check_targets(targets, logits.shape[:-1], logits.device, "logits without the last dimension")


def flat_rows(rows: Tensor) -> Tensor:
    """[..., V] -> [N, V] with neighbours in V side by side, as every kernel reads them."""
    flat = rows.reshape(-1, rows.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


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


def check_temperature(
    temperature: float | Tensor, targets: Tensor, dtype: torch.dtype = torch.float32
) -> float | Tensor:
    """A positive number, also as 0-d tensor on the CPU, or a tensor shaped like targets, which
    comes back flat and in `dtype`."""
    if isinstance(temperature, Tensor) and not temperature.dim() and temperature.is_cpu:
        temperature = temperature.item()
    if isinstance(temperature, Tensor):
        if temperature.shape != targets.shape:
            raise shape_error(
                "temperature", temperature, f"{tuple(targets.shape)} like targets, or a float"
            )
        check_device("temperature", temperature, targets.device)
        return temperature.detach().reshape(-1).to(dtype)
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
        # Autograd cannot save what inference mode made.
        return mask.clone() if mask.is_inference() else mask
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
    check_constant(name, tensor)
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
        check_cu_seqlens(cu_seqlens, rows, targets.device)
        sequences = cu_seqlens.numel() - 1
    spans = torch.diff(cu_seqlens).long()
    ids = torch.arange(sequences, device=targets.device).repeat_interleave(spans, output_size=rows)
    lengths = torch.zeros(sequences, dtype=dtype, device=targets.device)
    lengths.index_add_(0, ids, mask.reshape(-1).to(dtype))
    return Segments(cu_seqlens, ids, lengths)


def check_cu_seqlens(cu_seqlens: Tensor, rows: int, device: torch.device) -> None:
    """Offsets [S+1] from 0 to `rows`, ascending; their values are looked at on a CPU only."""
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
            "number of tokens"
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
    check_constant("advantages", advantages)
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
    group_ids: Tensor | None,
    group_lengths: Tensor | None,
    temperature: float | Tensor | None,
    denominator: float | Tensor | None,
    entropy_denominator: float | Tensor | None,
    config: LossConfig,
    vocabulary: int,
    dtype: torch.dtype,
) -> LossRows:
    """Check and flatten the per-token and per-sequence arguments of a loss call."""
    live = read_mask(mask, targets)
    check_ids(targets, live, vocabulary)
    segments = _segments(cu_seqlens, targets, live, dtype)
    _check_needs(config, segments, group_ids, denominator, ref_logprobs, sampler_logprobs, targets)
    per_row = _advantages(advantages, targets, segments, dtype)
    _check_finite("advantages", per_row, live, targets.shape)
    flat = live.reshape(-1)
    normaliser = _denominator("denominator", denominator, targets.device)
    entropy_normaliser = _denominator("entropy_denominator", entropy_denominator, targets.device)
    if config.adds_up != "prompt_mean":
        group_ids = group_lengths = None
    weights = token_weights(
        flat,
        config,
        segments=segments,
        group_ids=_per_sequence("group_ids", group_ids, segments),
        group_lengths=_per_sequence("group_lengths", group_lengths, segments),
        denominator=normaliser,
        dtype=dtype,
    )
    bonus = None
    if config.entropy_coef and config.top_entropy_quantile == 1:
        bonus = entropy_weights(
            flat, config, keep=None, denominator=entropy_normaliser, dtype=dtype
        )
    zeros = torch.zeros((), dtype=dtype, device=targets.device)

    def masked(name: str, tensor: Tensor | None) -> Tensor | None:
        values = _per_token(name, tensor, targets, dtype)
        return None if values is None else torch.where(flat, values, zeros)

    temperature = config.temperature if temperature is None else temperature
    return LossRows(
        targets=torch.where(flat, targets.reshape(-1), 0),
        mask=flat,
        advantages=torch.where(flat, per_row, zeros),
        weights=weights,
        temperature=check_temperature(temperature, targets, dtype),
        old_logp=masked("old_logprobs", old_logprobs),
        ref_logp=masked("ref_logprobs", ref_logprobs),
        sampler_logp=masked("sampler_logprobs", sampler_logprobs),
        entropy_weights=bonus,
        entropy_denominator=entropy_normaliser,
        segments=segments,
    )


def _check_needs(
    config: LossConfig,
    segments: Segments | None,
    group_ids: Tensor | None,
    denominator: float | Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    targets: Tensor,
) -> None:
    """What the chosen options cannot do without."""
    shape = tuple(targets.shape)
    adds_up, correction = config.adds_up, config.importance_sampling_correction
    needs = {
        f"loss_type '{config.loss_type}' ({adds_up})": adds_up in ("sequence_mean", "prompt_mean")
        or (adds_up in ("constant", "sequence_sum") and denominator is None),
        f"importance_sampling_level '{config.level}'": config.level != "token",
        f"loss_type '{config.loss_type}'": config.loss_type in WHOLE_SEQUENCE
        and config.objective is None,
        f"importance_sampling_correction '{correction}'": correction.startswith(("seq", "geo")),
        "off_policy_mask_threshold": config.off_policy_mask_threshold is not None,
    }
    for what, needed in needs.items():
        if needed and segments is None:
            raise InputError(
                f"{what} works per sequence: pass cu_seqlens [S+1] with packed targets [T]"
            )
    if adds_up == "constant" and denominator is None and config.max_completion_length is None:
        raise InputError(
            f"loss_type '{config.loss_type}' divides by max_completion_length: set it in "
            "LossConfig, or denominator"
        )
    if adds_up == "prompt_mean" and group_ids is None:
        raise InputError(
            "aggregation 'prompt_mean' needs group_ids [S], the prompt of each sequence: pass them"
        )
    if config.beta and ref_logprobs is None:
        raise InputError(
            f"beta = {config.beta} needs ref_logprobs {shape}: pass them or set beta = 0"
        )
    if correction != "none" and sampler_logprobs is None:
        raise InputError(
            f"importance_sampling_correction '{correction}' needs sampler_logprobs {shape}: pass "
            "them or choose 'none'"
        )


def _per_sequence(name: str, values: Tensor | None, segments: Segments | None) -> Tensor | None:
    if values is None:
        return None
    sequences = segments.lengths.shape
    found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if found != tuple(sequences) or values.is_floating_point():
        raise InputError(
            f"{name} has shape {found}, expected integers {tuple(sequences)}, one a sequence"
        )
    check_device(name, values, segments.lengths.device)
    return values


def _denominator(
    name: str, denominator: float | Tensor | None, device: torch.device
) -> float | Tensor | None:
    if denominator is None:
        return None
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise shape_error(name, denominator, "one number")
        if denominator.device.type == "cpu":
            denominator = denominator.item()
        else:
            return denominator.detach().reshape(()).to(device)
    if not (math.isfinite(denominator) and denominator > 0):
        raise InputError(
            f"{name} = {denominator}, expected a finite number > 0: the normaliser of the step"
        )
    return float(denominator)
