"""Random inputs at real sizes, made on the device they are used on.

Letters: `N` rows, `D` hidden, `V` vocabulary. Logits look like those of a trained policy: most
targets likely, old log-probs within a clip or two of the new ones.
"""

import math

import torch
from torch import Tensor

# Rows whose log-probs are computed at a time: their float32 copies stay small beside the logits.
CHUNK = 256


def generator_on(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def policy_rows(
    n: int, v: int, dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of `policy_loss`: logits [N, V], targets, advantages, weights, old_logp [N]; no row
    masked."""
    source = generator_on(device, seed)
    options = {"generator": source, "device": device}
    # One standard deviation of 2 below a planted target: entropies of a few nats down to none.
    logits = torch.randn(n, v, dtype=dtype, **options).mul_(2)
    targets = torch.randint(0, v, (n,), **options)
    height = torch.rand(n, 1, **options) * 16 + math.log(v)
    logits.scatter_add_(1, targets[:, None], height.to(dtype))
    logp = torch.cat(
        [
            part.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
            for part, ids in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
        ]
    )
    return {
        "logits": logits,
        "targets": targets,
        "advantages": torch.randn(n, **options),
        "weights": torch.full((n,), 1.0 / n, device=device),
        "old_logp": logp + 0.15 * torch.randn(n, **options),
    }


def linear_rows(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int = 0,
    margin: tuple[float, float] = (0.0, 16.0),
) -> dict[str, Tensor]:
    """Arguments of `linear_grpo_loss`, packed: hidden [N, D], weight [V, D], the rest [N]. The
    target is `margin` nats (uniform between the two) above all other entries together."""
    source = generator_on(device, seed)
    options = {"generator": source, "device": device}
    weight = torch.randn(v, d, dtype=dtype, **options).div_(math.sqrt(d))
    targets = torch.randint(0, v, (n,), **options)
    height = torch.empty(n, 1, device=device).uniform_(*margin, generator=source) + math.log(v)
    direction = weight[targets].float()
    planted = direction * (height / direction.square().sum(-1, keepdim=True))
    hidden = torch.randn(n, d, dtype=dtype, **options).add_(planted.to(dtype))
    logp = torch.cat(
        [
            (part @ weight.t()).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
            for part, ids in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        ]
    )
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "advantages": torch.randn(n, **options),
        "old_logprobs": logp + 0.15 * torch.randn(n, **options),
    }
