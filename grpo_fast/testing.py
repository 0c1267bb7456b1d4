"""What tests and benchmarks share: random rows, and the one rule by which a result is right.

Shapes: `N` rows, `D` hidden, `V` vocabulary, `S` sequences.
"""

import math

import torch
from torch import Tensor

# Roundings of the result's dtype granted on top of the eager run's error: half precision is stored
# once, float32 is summed over rows, and float64 is no more exact than its oracle.
SLACK_EPS = {torch.float64: 64, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}


def assert_close_to_oracle(
    actual: Tensor,
    eager: Tensor,
    oracle: Tensor,
    *,
    name: str,
    factor: float = 2.0,
    scale: float = 0.0,
) -> None:
    """`actual` is at most `factor` times as far from the float64 `oracle` as the same-dtype `eager`
    run is.

    Both the largest error and the relative Frobenius error are held to it, each with a slack of a
    few roundings of the compared dtype, of the largest entry or of `scale`: the size of what was
    summed, where terms cancel. NaN and inf must stand in the same places with the same sign.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, expected {oracle.shape}"
    got, base, truth = (x.detach().double().cpu() for x in (actual, eager, oracle))
    finite = truth.isfinite()
    same = (got == truth) | (got.isnan() & truth.isnan())
    odd = (~finite & ~same) | (finite & ~got.isfinite())
    assert not odd.any(), (
        f"{name}: {int(odd.sum())} entries are finite in one and not in the other, first at "
        f"{odd.nonzero()[0].tolist()}: got {got[odd][0]}, oracle {truth[odd][0]}"
    )
    if not finite.any():
        return
    slack = SLACK_EPS[actual.dtype] * torch.finfo(actual.dtype).eps
    error, baseline = (got - truth)[finite], (base - truth)[finite].nan_to_num()
    scale = max(scale, float(truth[finite].abs().max()))
    limit = factor * float(baseline.abs().max()) + slack * scale
    worst = float(error.abs().max())
    assert worst <= limit, (
        f"{name}: largest error {worst:.3e}, allowed {limit:.3e} (scale {scale:.3e})"
    )
    norm = max(scale, float(truth[finite].norm()))
    relative, allowed = float(error.norm()), factor * float(baseline.norm()) + slack * norm
    assert relative <= allowed, (
        f"{name}: error norm {relative:.3e}, allowed {allowed:.3e} (norm {norm:.3e})"
    )


def random_rows(
    n: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    peaked: bool = True,
    masked: float = 0.3,
) -> dict[str, Tensor]:
    """Arguments of `policy_loss` as a trained policy has them: most targets likely, ratios around
    the clip.

    `peaked` plants the target high in most rows (p from 0.1 to 1 - 1e-6); `masked` is the share of
    weight-0 rows.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = normal(n, v) * 2
    targets = torch.randint(0, v, (n,), generator=generator)
    if peaked and n:
        height = torch.rand(n, generator=generator, dtype=torch.float64) * 16 + math.log(v)
        likely = torch.rand(n, generator=generator) < 0.7
        rows = likely.nonzero()[:, 0]
        logits[rows, targets[rows]] += height[rows]
    logits = logits.to(dtype)
    logp = logits.double().log_softmax(-1)[torch.arange(n), targets]
    weights = torch.rand(n, generator=generator, dtype=torch.float64) / max(n, 1)
    weights[torch.rand(n, generator=generator) < masked] = 0.0
    rows = {
        "logits": logits,
        "targets": targets,
        "advantages": normal(n).float(),
        "weights": weights.float(),
        "old_logp": (logp + 0.3 * normal(n)).clamp(max=0).float(),
        "ref_logp": (logp + 0.5 * normal(n)).clamp(max=0).float(),
    }
    return {name: value.to(device) for name, value in rows.items()}


def random_sequences(
    s: int,
    length: int,
    d: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of `linear_grpo_loss`, padded [S, L]: peaked head, random mask with one empty
    sequence, garbage under it, groups of two; a tenth of the tokens the sampler did not score."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = (normal(v, d) / math.sqrt(d)).to(dtype)
    targets = torch.randint(0, v, (s, length), generator=generator)
    hidden = (normal(s, length, d) + 3 * weight.double()[targets]).to(dtype)
    mask = torch.rand(s, length, generator=generator) < 0.7
    if s > 1:
        mask[0] = False
    logits = hidden.double() @ weight.double().T
    logp = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    def policy(distance: float, masked: float) -> Tensor:
        other = (logp + distance * normal(s, length)).clamp(max=0)
        return other.float().masked_fill(~mask, masked)

    batch = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets.masked_fill(~mask, -100),
        "advantages": normal(s).float(),
        "mask": mask,
        "old_logprobs": policy(0.3, masked=math.nan),
        "ref_logprobs": policy(0.5, masked=math.inf),
        "sampler_logprobs": policy(0.4, masked=-math.inf),
        "group_ids": torch.arange(s) // 2,
    }
    unscored = torch.rand(s, length, generator=generator) < 0.1
    batch["sampler_logprobs"].masked_fill_(unscored, math.nan)
    return {name: value.to(device) for name, value in batch.items()}
