"""The kernels' launchers in plain PyTorch, for any device: same names, arguments and results as
`grpo_kernels`.

Shapes: `N` rows, `V` vocabulary, `S` sequences, `T` packed tokens, `P` groups. Arithmetic is
float32 (float64 for float64 input), whatever the dtype of the logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import LossConfig
from .objective import policy_terms


class TokenLogProb(NamedTuple):
    logp: Tensor
    lse: Tensor
    entropy: Tensor | None


class PolicyRows(NamedTuple):
    loss: Tensor
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor | None


class GroupAdvantage(NamedTuple):
    advantages: Tensor
    mean: Tensor
    std: Tensor
    degenerate: Tensor


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _column(temperature: float | Tensor) -> float | Tensor:
    return temperature[:, None] if isinstance(temperature, Tensor) else temperature


def token_logprob_fwd(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = True,
) -> TokenLogProb:
    """`log_softmax(logits / temperature).gather(targets)`: logits [N, V], targets [N] -> three [N].

    The target's own term is kept out of the sum: for p -> 1, log p = -log1p(others / target) loses
    no digit.
    """
    x = _exact(logits) / _column(temperature)
    index = targets[:, None].long()
    peak = x.amax(-1, keepdim=True)
    # A row of -inf only has no peak to subtract; its result is NaN by definition.
    shifted = x.sub_(peak)
    target = shifted.gather(1, index)[:, 0]
    exps = shifted.exp()
    target_exp = target.exp()
    others = exps.scatter_(1, index, 0.0).sum(-1)
    total = others + target_exp
    logp = torch.where(target_exp > others, -torch.log1p(others / target_exp), target - total.log())
    entropy = None
    if return_entropy:
        finite = shifted.clamp_(min=torch.finfo(shifted.dtype).min)
        weighted = torch.linalg.vecdot(exps, finite) + torch.where(
            target_exp > 0, target_exp * target, target_exp
        )
        entropy = total.log() - weighted / total
    return TokenLogProb(logp, peak[:, 0] + total.log(), entropy)


def token_logprob_bwd(
    dlogp: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    *,
    temperature: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """`dlogp (1[v = target] - p) - dentropy p (log p + entropy)`, over temperature: -> [N, V] like
    logits, or in `out`.

    Rows whose incoming gradients are 0 come out as exact zeros, whatever their logits hold.
    """
    logps = _exact(logits) / _column(temperature) - lse[:, None]
    index = targets[:, None].long()
    probs = logps.exp()
    live = dlogp != 0
    grad = (-dlogp[:, None] * probs).scatter_(1, index, 0.0)
    # The target's 1 - p is the sum of all other p, which loses no digit as p goes to 1.
    grad.scatter_(1, index, -grad.sum(-1, keepdim=True))
    if dentropy is not None:
        live = live | (dentropy != 0)
        finite = logps.clamp_(min=torch.finfo(logps.dtype).min)
        grad -= dentropy[:, None] * probs * (finite + entropy[:, None])
    grad = torch.where(live[:, None], grad.div_(_column(temperature)), 0.0)
    return grad.to(logits.dtype) if out is None else out.copy_(grad)


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    log_ratio_clamp: float = 20.0,
    dlogits: Tensor | None = None,
) -> PolicyRows:
    """`reference.policy_loss` and, in `dlogits`, the gradient of its summed loss: logits [N, V],
    the rest [N].

    `weights` 0 marks a masked row: all its outputs and its gradient are exactly 0. `dlogits` may be
    `logits` itself.
    """
    config = LossConfig(
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        delta=delta,
        beta=beta,
        kl_estimator=kl_estimator,
        log_ratio_clamp=log_ratio_clamp,
    )
    keep = weights != 0
    targets = torch.where(keep, targets, 0)
    rows = token_logprob_fwd(logits, targets, temperature=temperature)

    def live(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(keep, x, 0.0)

    logp = live(rows.logp)
    terms = policy_terms(
        logp,
        live(advantages),
        weights,
        old_logp=live(old_logp),
        ref_logp=live(ref_logp),
        config=config,
    )
    if dlogits is not None:
        token_logprob_bwd(
            live(terms.slope),
            None,
            logits,
            targets,
            rows.lse,
            None,
            temperature=temperature,
            out=dlogits,
        )
    return PolicyRows(live(terms.loss), logp, live(rows.entropy), live(terms.ratio), live(terms.kl))


def segment_reduce(x: Tensor, cu_seqlens: Tensor, *, reduce: str = "sum") -> Tensor:
    """`[reduce(x[a:b]) for a, b in pairwise(cu_seqlens)]`: x [T], cu_seqlens [S+1] -> [S]; an empty
    segment is 0."""
    return torch.segment_reduce(_exact(x), reduce, offsets=cu_seqlens.long(), initial=0.0)


def group_advantage(
    rewards: Tensor,
    offsets: Tensor,
    *,
    order: Tensor | None = None,
    scale_by_std: bool = True,
    leave_one_out: bool = False,
    unbiased: bool = True,
    eps: float = 1e-4,
) -> GroupAdvantage:
    """`(r - mean_group) / (std_group + eps)`: rewards [S] float32, NaN = not scored, left out and
    given 0.

    Members of group p are `order[offsets[p]:offsets[p+1]]` (identity without `order`); statistics
    are [P].
    """
    r = rewards if order is None else rewards[order.long()]
    sizes = torch.diff(offsets).long()
    group = torch.arange(len(sizes), device=r.device).repeat_interleave(sizes, output_size=len(r))
    scored = ~r.isnan()

    def total(x: Tensor) -> Tensor:
        return segment_reduce(x, offsets)

    count = total(scored)
    mean = total(torch.where(scored, r, 0.0)) / count
    centred = torch.where(scored, r - mean[group], 0.0)
    std = (total(centred.square()) / (count - int(unbiased)).clamp(min=0)).sqrt()
    std = torch.where(count >= 2, std, torch.nan)
    low = torch.segment_reduce(torch.where(scored, r, torch.inf), "min", offsets=offsets.long())
    high = torch.segment_reduce(torch.where(scored, r, -torch.inf), "max", offsets=offsets.long())
    degenerate = (count < 2) | (low == high)
    # r minus the mean of the others is the centred reward times n / (n - 1)
    advantages = centred * (count / (count - 1))[group] if leave_one_out else centred
    advantages = advantages / (std + eps)[group] if scale_by_std else advantages
    advantages = torch.where(scored & ~degenerate[group], advantages, 0.0)
    if order is not None:
        advantages = torch.empty_like(advantages).index_copy_(0, order.long(), advantages)
    return GroupAdvantage(advantages, mean, std, degenerate)
