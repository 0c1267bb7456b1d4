"""The kernels' launchers in plain PyTorch, for any device: same names, arguments and results as
`grpo_kernels`.

Shapes: `N` rows, `V` vocabulary, `S` sequences, `T` packed tokens, `P` groups. Arithmetic is
float32 (float64 for float64 input), whatever the dtype of the logits.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .objective import TOKEN_OBJECTIVES, Bounds
from .policy_terms import gradient_mass, row_terms
from .rows import LossRows
from .torch_segments import group_advantage as group_advantage
from .torch_segments import segment_reduce as segment_reduce

# Entries of a block whose share of each core stays in its second-level cache (a GPU is given more
# than it can hold: launches are what costs there), and the fewest rows a block is cut from: few
# rows of a large vocabulary would make it a list of short pieces.
ENTRIES_PER_CORE, ENTRIES_ELSEWHERE, BLOCK_ROWS = 2**17, 2**26, 256
# exp of it, and of everything below, is 0 in every dtype; times 0 it is 0, which -inf is not.
VANISHED = -1e4


class TokenLogProb(NamedTuple):
    logp: Tensor
    lse: Tensor
    entropy: Tensor | None
    other_squares: Tensor | None


class PolicyRows(NamedTuple):
    loss: Tensor
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor | None
    mass: Tensor
    slope: Tensor


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _column(temperature: float | Tensor) -> float | Tensor:
    return temperature[:, None] if isinstance(temperature, Tensor) else temperature


class RowStatistics(NamedTuple):
    """What the rest of a row needs of its logits x [V]: sums over every entry but the target's, of
    e = exp((x - peak) / temperature). All [N]."""

    peak: Tensor
    target: Tensor
    """(x[target] - peak) / temperature."""
    others: Tensor
    """sum(e)."""
    weighted: Tensor | None
    """sum(e log e)."""
    squares: Tensor | None
    """sum(e^2)."""


def _cut(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _blocks(logits: Tensor) -> tuple[list[slice], list[slice]]:
    """(rows, columns) of logits [N, V], cut so that a block stays in the cache."""
    n, v = logits.shape
    entries = ENTRIES_PER_CORE * torch.get_num_threads() if logits.is_cpu else ENTRIES_ELSEWHERE
    height = max(min(n, max(BLOCK_ROWS, entries // v)), 1)
    return _cut(n, height), _cut(v, max(entries // height, 1))


def _rows(x, part: slice):
    """`x[part]` of a tensor; one number for all rows stays what it is, and so does None."""
    return x[part] if isinstance(x, Tensor) else x


def _columns(x: Tensor, part: slice) -> Tensor:
    """`x[:, part]`, without the view where that is all of x."""
    return x if part.stop - part.start == x.shape[1] else x[:, part]


def _first(block: Tensor, part: slice) -> Tensor:
    """As many columns of a block as `part` has."""
    return _columns(block, slice(0, part.stop - part.start))


def _exclude(block: Tensor, index: Tensor, part: slice, size: int) -> None:
    """-inf to the target's entry of each row, in a block that is columns `part` of `size`."""
    value = -math.inf
    if block.shape[1] < size:
        here = (index >= part.start) & (index < part.stop)
        index = torch.where(here, index - part.start, 0)
        value = torch.where(here, value, block.gather(1, index))
    block.scatter_(1, index, value)


def row_statistics(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    *,
    entropy: bool = True,
    squares: bool = False,
    exps: Tensor | None = None,
) -> RowStatistics:
    """Statistics of logits [N, V], in any layout, a block that fits the cache at a time.

    `exps` [N, V] in the exact dtype, which may be `logits` themselves, gets e, 0 at the target: its
    term is kept apart, so that 1 - p keeps its digits as p goes to 1.
    """
    rows, columns = _blocks(logits)
    if len(rows) > 1:
        parts = [
            row_statistics(
                logits[part],
                targets[part],
                _rows(temperature, part),
                entropy=entropy,
                squares=squares,
                exps=_rows(exps, part),
            )
            for part in rows
        ]
        fields = zip(*parts, strict=True)
        return RowStatistics(*(None if field[0] is None else torch.cat(field) for field in fields))
    exact = torch.promote_types(logits.dtype, torch.float32)
    scratch = torch.empty_like(_columns(logits, columns[0]), dtype=exact)
    peak, index, t = _peak(logits, columns, scratch), targets[:, None].long(), _column(temperature)
    target = (logits.gather(1, index) - peak) / t
    sums = []
    for part in columns:
        shifted = _first(scratch, part)
        torch.sub(_columns(logits, part), peak, out=shifted)
        if isinstance(t, Tensor) or t != 1.0:
            shifted.div_(t)
        _exclude(shifted, index, part, logits.shape[1])
        e = torch.exp(shifted, out=None if exps is None else _columns(exps, part))
        others, weighted, square = e.sum(-1), None, None
        if entropy:
            # 0 log 0 is 0 and not NaN; a row that holds NaN has it in the other sums.
            weighted = shifted.mul_(e).nansum(-1)
        if squares:
            square = torch.square(e, out=shifted).sum(-1)
        sums.append((others, weighted, square))
    totals = sums[0] if len(sums) == 1 else map(_total, zip(*sums, strict=True))
    return RowStatistics(peak[:, 0], target[:, 0], *totals)


def _total(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    return None if parts[0] is None else torch.stack(parts).sum(0)


def _peak(x: Tensor, columns: list[slice], scratch: Tensor) -> Tensor:
    """`x.amax(-1, keepdim=True)` in the dtype of `scratch`, one block wide: [N, 1].

    Folding the blocks first is three times as fast where neighbours in a row are far apart. A row
    of -inf only has no peak to subtract; its result is NaN by definition.
    """
    if len(columns) == 1:
        return x.amax(-1, keepdim=True).to(scratch.dtype)
    scratch.copy_(x[:, columns[0]])
    for part in columns[1:]:
        fold = _first(scratch, part)
        torch.maximum(fold, x[:, part], out=fold)
    return scratch.amax(-1, keepdim=True)


def token_logprob_fwd(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = True,
    return_squares: bool = False,
) -> TokenLogProb:
    """`log_softmax(logits / temperature).gather(targets)`: logits [N, V], targets [N] -> three [N].

    For p -> 1, -log p = log1p((1 - p) / p) loses no digit, and neither does the entropy.
    """
    rows = row_statistics(
        logits, targets, temperature, entropy=return_entropy, squares=return_squares
    )
    return _log_probs(rows, temperature)


def _log_probs(rows: RowStatistics, temperature: float | Tensor) -> TokenLogProb:
    peak, target, others, weighted, squares = rows
    power = target.exp()
    total = others + power
    likely, odds = power > others, torch.log1p(others / power)
    log_total = torch.where(likely, target + odds, total.log())
    logp = torch.where(likely, -odds, target - log_total)
    entropy = None
    if weighted is not None:
        own = torch.where(power > 0, power * target, power)
        entropy = log_total - (weighted + own) / total
    squares = None if squares is None else squares / total.square()
    return TokenLogProb(logp, peak / temperature + log_total, entropy, squares)


def gradient_(
    exps: Tensor,
    targets: Tensor,
    rows: RowStatistics,
    slope: Tensor,
    temperature: float | Tensor,
) -> Tensor:
    """`slope (1[v = target] - p) / temperature` in place of the exps of `row_statistics`, [N, V].

    Rows of slope 0 become exact zeros, whatever they held.
    """
    factor = slope / ((rows.others + rows.target.exp()) * temperature)
    # The target's 1 - p is the sum of all other p, which loses no digit as p goes to 1.
    at_target = factor * rows.others
    exps.mul_(-factor[:, None]).scatter_(1, targets[:, None].long(), at_target[:, None])
    return _zeroed(exps, slope == 0, at_target)


def _zeroed(gradient: Tensor, dead: Tensor, at_target: Tensor) -> Tensor:
    """Exact zeros in the dead rows of a gradient that is 0 there already, unless NaN was: a sweep
    that a CPU can spare."""
    if gradient.is_cuda or (dead.any() and (dead := dead & at_target.isnan()).any()):
        gradient.masked_fill_(dead[:, None], 0.0)
    return gradient


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
    out = torch.empty_like(logits) if out is None else out
    rows, columns = _blocks(logits)
    if len(rows) > 1:
        for part in rows:
            token_logprob_bwd(
                dlogp[part],
                _rows(dentropy, part),
                logits[part],
                targets[part],
                lse[part],
                _rows(entropy, part),
                temperature=_rows(temperature, part),
                out=out[part],
            )
        return out
    index, t = targets[:, None].long(), _column(temperature)
    slope, lse, at_target = dlogp[:, None], lse[:, None], 0.0
    dead = dlogp == 0
    if dentropy is not None:
        dead &= dentropy == 0
        dentropy, entropy = dentropy[:, None], entropy[:, None]
        logp = logits.gather(1, index).to(lse.dtype) / t - lse
        at_target = -dentropy * logp.exp() * (logp.clamp(min=VANISHED) + entropy)
    scratch = torch.empty_like(_columns(logits, columns[0]), dtype=lse.dtype)
    probs = torch.empty_like(scratch)
    for part in columns:
        logps, p = (_first(x, part) for x in (scratch, probs))
        logps.copy_(_columns(logits, part)).div_(t).sub_(lse)
        _exclude(logps, index, part, logits.shape[1])
        torch.exp(logps, out=p)
        # The target's 1 - p is the sum of all other p, which loses no digit as p goes to 1.
        at_target = at_target + slope * p.sum(-1, keepdim=True)
        if dentropy is None:
            p.mul_(slope)
        else:
            p.mul_(logps.clamp_(min=VANISHED).add_(entropy).mul_(dentropy).add_(slope))
        _columns(out, part).copy_(p.div_(-t))
    out.scatter_(1, index, (at_target / t).to(out.dtype))
    return _zeroed(out, dead, at_target[:, 0])


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    policy_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    objective: str = "clip",
    low: float = 0.0,
    high: float = 0.0,
    cap: float = math.inf,
    dual_clip: float = math.inf,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    bias_corrected_kl: bool = False,
    log_ratio_clamp: float = 20.0,
    dlogits: Tensor | None = None,
) -> PolicyRows:
    """`reference.policy_loss` and, in `dlogits`, the gradient of its summed loss: logits [N, V],
    the rest [N].

    `weights` 0 marks a masked row: all its outputs and its gradient are exactly 0. `dlogits` may be
    `logits` itself.
    """
    mask = weights != 0

    def live(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(mask, x, 0.0)

    rows = LossRows(
        targets=torch.where(mask, targets, 0),
        mask=mask,
        advantages=live(advantages),
        weights=weights,
        temperature=temperature,
        old_logp=live(old_logp),
        ref_logp=live(ref_logp),
        correction=live(policy_weights),
        entropy_weights=live(entropy_weights),
    )
    # The gradient is made of the exponentials of the forward, where it can hold them.
    plain = dlogits is not None and entropy_weights is None and dlogits.dtype == weights.dtype
    statistics = row_statistics(
        logits, rows.targets, temperature, squares=True, exps=dlogits if plain else None
    )
    found = _log_probs(statistics, temperature)
    bounds = Bounds(low, high, cap, dual_clip)
    terms = row_terms(
        found.logp,
        found.entropy,
        rows,
        lambda tokens: TOKEN_OBJECTIVES[objective](tokens, bounds),
        beta=beta,
        kl_estimator=kl_estimator,
        bias_corrected_kl=bias_corrected_kl,
        log_ratio_clamp=log_ratio_clamp,
    )
    if plain:
        gradient_(dlogits, rows.targets, statistics, terms.slope, temperature)
    elif dlogits is not None:
        bonus = terms.entropy_slope
        token_logprob_bwd(
            terms.slope,
            bonus,
            logits,
            rows.targets,
            found.lse,
            None if bonus is None else found.entropy,
            temperature=temperature,
            out=dlogits,
        )
    mass = gradient_mass(terms.slope, found.logp, found.other_squares, temperature)
    return PolicyRows(
        terms.loss,
        live(found.logp),
        live(found.entropy),
        terms.ratio,
        terms.kl,
        live(mass),
        terms.slope,
    )
