"""The loss from hidden states, and its gradients in the same sweep: no [N, V] tensor ever exists.

Shapes: `N` rows of the caller, `M` of them live, `S` sequences, `D` hidden, `V` vocabulary. Costs
in head GEMMs G = 2 M D V FLOP: without gradient 1G; with it 3G, since a row's slope in the logits
is known as soon as its log-prob is, and for sequence-level objectives as soon as those of its
sequence are; 4G where one sequence's logits exceed the workspace; 2G with a frozen head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .aggregation import entropy_weights, top_entropy
from .chunked import Head, chunk_rows, chunks, head_products, masked
from .correction import known_correction, needs_sequences
from .loss_config import LossConfig
from .objective import bounds_of, objective_name
from .policy_terms import PolicyTerms, gradient_mass, policy_terms
from .products import Gradients, HeadProducts, exact_dtype
from .rows import LossRows
from .vocab_parallel import Shard


class LossResult(NamedTuple):
    """Per-token results [M] and the gradients of the summed loss."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor | None
    mass: Tensor
    """Gradient mass: the norm of the policy and KL part of a row of d(loss) / d(logits)."""
    slope: Tensor
    """d(loss) / d(logp) of that part."""
    gradients: Gradients | None


class Block(NamedTuple):
    """Rows whose slopes are known together, and the chunks their logits come in."""

    rows: slice
    parts: list[slice]
    sequences: tuple[int, int] | None
    """First and last + 1 of the sequences they are, where anything is per sequence."""


@dataclass(frozen=True, slots=True)
class Job:
    """One call: what every block needs."""

    hidden: Tensor
    """[N, D]."""
    head: Head
    index: Tensor | None
    """[M] live rows of `hidden`; all where None."""
    config: LossConfig
    kernels: ModuleType
    needed: tuple[bool, bool, bool]
    products: HeadProducts
    shard: Shard | None

    def place(self, part: slice) -> slice | Tensor:
        """Live rows `part` as rows of the caller."""
        return part if self.index is None else self.index[part]

    def logits(self, part: slice, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden states, exact logits, until the next call) of the live rows `part`."""
        chunk = masked(self.hidden[self.place(part)], mask if self.index is None else None)
        return chunk, self.head.logits_(self.products.logits(chunk))


def linear_loss(
    hidden: Tensor,
    head: Head,
    rows: LossRows,
    config: LossConfig,
    *,
    index: Tensor | None = None,
    needed: tuple[bool, bool, bool],
    kernels: ModuleType,
    shard: Shard | None = None,
) -> LossResult:
    """Loss rows of `head(hidden[index])` and, where `needed`, gradients in (hidden, weight, bias).

    One kernel a chunk where it knows the objective and a slope waits for nothing but its own row;
    else statistics, `policy_terms` and gradient, a block at a time.
    """
    products = head_products(
        hidden, head, needed, kernels, every_row=index is None, summed=shard is not None
    )
    job = Job(hidden, head, index, config, kernels, needed, products, shard)
    rows = known_beforehand(rows, config, kernels, lambda: _entropies(job, rows))
    names = ("loss", "logp", "entropy", "ratio", "mass", "slope")
    names += () if rows.ref_logp is None else ("kl",)
    out = {name: hidden.new_empty(len(rows), dtype=exact_dtype(hidden)) for name in names}
    fused = shard is None and one_kernel(rows, config)
    compute = _kernel_block if fused else _general_block
    for block in _blocks(job, rows):
        result = compute(job, rows.part(block.rows, block.sequences), block)
        for name, whole in out.items():
            whole[block.rows] = getattr(result, name)
    if shard is not None and products.dhidden is not None:
        shard.sum_(products.dhidden)
    return LossResult(gradients=products.gradients(), **{"kl": None, **out})


def one_kernel(rows: LossRows, config: LossConfig) -> bool:
    """Whether `kernels.policy_loss` has the objective and a slope waits for its own row alone."""
    waits = config.importance_sampling_correction != "none" and rows.correction is None
    sequences = needs_sequences(config, on_policy=rows.old_logp is None)
    return not (sequences or waits or config.objective is not None)


def known_beforehand(
    rows: LossRows, config: LossConfig, kernels: ModuleType, entropies: Callable[[], Tensor]
) -> LossRows:
    """What does not wait for a block's logits: the sampler's correction, the top-entropy mask."""
    rows = rows.replace(correction=known_correction(rows, config, reduce=kernels.segment_reduce))
    if config.top_entropy_quantile == 1:
        return rows
    keep = top_entropy(entropies(), rows.mask, config.top_entropy_quantile)
    bonus = None
    if config.entropy_coef:
        bonus = entropy_weights(rows.mask, config, keep=keep, denominator=rows.entropy_denominator)
    return rows.replace(keep=keep, entropy_weights=bonus)


def _entropies(job: Job, rows: LossRows) -> Tensor:
    entropy = torch.empty_like(rows.weights)
    for part in chunks(len(rows), job.head.weight.shape[0], job.hidden.device):
        entropy[part] = _statistics(job, rows.part(part), part)[1].entropy
    return entropy


def _blocks(job: Job, rows: LossRows) -> Iterator[Block]:
    """Chunks that fit the workspace; of whole sequences where a slope waits for its sequence."""
    size = chunk_rows(job.head.weight.shape[0], job.hidden.device)
    waits = needs_sequences(job.config, on_policy=rows.old_logp is None)
    if rows.segments is None or not waits:
        for part in chunks(len(rows), job.head.weight.shape[0], job.hidden.device):
            yield Block(part, [part], None)
        return
    offsets = rows.segments.cu_seqlens.tolist()
    first = 0
    while first + 1 < len(offsets):
        last = first + 1
        while last + 1 < len(offsets) and offsets[last + 1] - offsets[first] <= size:
            last += 1
        start, end = offsets[first], offsets[last]
        parts = [slice(k, min(k + size, end)) for k in range(start, end, size)]
        if parts:
            yield Block(slice(start, end), parts, (first, last))
        first = last


def kernel_options(config: LossConfig) -> dict:
    """The keywords of the `policy_loss` launchers that a config decides."""
    return {
        "objective": objective_name(config),
        **bounds_of(config)._asdict(),
        "beta": config.beta,
        "kl_estimator": config.kl_estimator,
        "bias_corrected_kl": config.use_bias_correction_kl,
        "log_ratio_clamp": config.log_ratio_clamp,
    }


def policy_weights(rows: LossRows) -> Tensor | None:
    """What multiplies the policy term alone: correction x top-entropy mask."""
    if rows.keep is None or rows.correction is None:
        return rows.correction if rows.keep is None else rows.keep
    return rows.correction * rows.keep


def _kernel_block(job: Job, rows: LossRows, block: Block) -> NamedTuple:
    """One launch: loss, and the gradient in place of the logits."""
    chunk, logits = job.logits(block.rows, rows.mask)
    if not any(job.needed):
        return kernel_loss(job.kernels, logits, rows, job.config, None)
    # The slope of a softcap is in what it gave.
    dlogits = logits if job.head.softcap is None else torch.empty_like(logits)
    result = kernel_loss(job.kernels, logits, rows, job.config, dlogits)
    job.products.add(job.place(block.rows), chunk, job.head.backward_(dlogits, logits))
    return result


def kernel_loss(
    kernels: ModuleType, logits: Tensor, rows: LossRows, config: LossConfig, dlogits: Tensor | None
) -> NamedTuple:
    """`kernels.policy_loss` of these rows."""
    return kernels.policy_loss(
        logits,
        rows.targets,
        rows.advantages,
        rows.weights,
        old_logp=rows.old_logp,
        ref_logp=rows.ref_logp,
        policy_weights=policy_weights(rows),
        entropy_weights=rows.entropy_weights,
        temperature=rows.temperature,
        dlogits=dlogits,
        **kernel_options(config),
    )


def _statistics(job: Job, rows: LossRows, part: slice) -> tuple[Tensor, NamedTuple, Tensor]:
    """(hidden states, row statistics, logits) of the live rows `part`; `rows` are those rows."""
    chunk, logits = job.logits(part, rows.mask)
    targets, here = (rows.targets, None) if job.shard is None else job.shard.local(rows.targets)
    found = job.kernels.token_logprob_fwd(
        logits, targets, temperature=rows.temperature, return_squares=True
    )
    return chunk, found if job.shard is None else job.shard.statistics(found, here), logits


def _gradient(
    job: Job, rows: LossRows, found: NamedTuple, logits: Tensor, slope: Tensor, bonus: Tensor | None
) -> Tensor:
    """d(loss) / d(logits before softcap and scale), in place of the logits where that can be."""
    capped = logits.clone() if job.head.softcap is not None else logits
    arguments = (slope, bonus, logits, rows.targets)
    if job.shard is not None:
        dlogits = job.shard.gradient_(
            *arguments, found, temperature=rows.temperature, kernels=job.kernels
        )
    else:
        entropy = None if bonus is None else found.entropy
        dlogits = job.kernels.token_logprob_bwd(
            *arguments, found.lse, entropy, temperature=rows.temperature, out=logits
        )
    return job.head.backward_(dlogits, capped)


class BlockResult(NamedTuple):
    loss: Tensor
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor | None
    mass: Tensor
    slope: Tensor


def _general_block(job: Job, rows: LossRows, block: Block) -> BlockResult:
    """Statistics of the block's rows, their slopes, then the gradient chunk by chunk.

    A block of one chunk keeps its logits. A larger one makes them again, unless the head is
    frozen: then d(hidden) of slope 1 is kept and scaled once the slopes are known.
    """
    scaled = job.needed == (True, False, False) and rows.entropy_weights is None
    scaled = scaled and len(block.parts) > 1 and job.config.objective is None
    kept: list[NamedTuple] = []
    for part in block.parts:
        here = rows.part(_within(part, block))
        chunk, found, logits = _statistics(job, here, part)
        kept.append(found)
        if scaled:
            dlogits = _gradient(job, here, found, logits, torch.ones_like(found.logp), None)
            job.products.add(job.place(part), chunk, dlogits)
    logp, entropy, squares = (
        torch.cat([getattr(found, name) for found in kept])
        for name in ("logp", "entropy", "other_squares")
    )
    terms = policy_terms(logp, entropy, rows, job.config, reduce=job.kernels.segment_reduce)
    if scaled:
        job.products.scale_hidden(job.place(block.rows), terms.slope)
    elif any(job.needed):
        for part, found in zip(block.parts, kept, strict=True):
            within = _within(part, block)
            here = rows.part(within)
            if len(block.parts) > 1:
                chunk, logits = job.logits(part, here.mask)
            bonus = None if terms.entropy_slope is None else terms.entropy_slope[within]
            dlogits = _gradient(job, here, found, logits, terms.slope[within], bonus)
            job.products.add(job.place(part), chunk, dlogits)
    return block_result(logp, entropy, squares, terms, rows)


def block_result(
    logp: Tensor, entropy: Tensor, squares: Tensor, terms: PolicyTerms, rows: LossRows
) -> BlockResult:
    """What `policy_loss` would have returned; masked rows are 0."""
    mass = gradient_mass(terms.slope, logp, squares, rows.temperature)
    logp, entropy, mass = (torch.where(rows.mask, x, 0.0) for x in (logp, entropy, mass))
    return BlockResult(terms.loss, logp, entropy, terms.ratio, terms.kl, mass, terms.slope)


def _within(part: slice, block: Block) -> slice:
    return slice(part.start - block.rows.start, part.stop - block.rows.start)


def logits_loss(
    logits: Tensor, rows: LossRows, config: LossConfig, *, kernels: ModuleType, out: Tensor | None
) -> NamedTuple:
    """Loss rows of logits [N, V] and, in `out`, which may be `logits`, the gradient of their sum.

    One launch where the kernel knows the objective, else statistics, `policy_terms`, gradient.
    """
    options = {"temperature": rows.temperature}

    def statistics() -> NamedTuple:
        return kernels.token_logprob_fwd(logits, rows.targets, return_squares=True, **options)

    rows = known_beforehand(rows, config, kernels, lambda: statistics().entropy)
    if one_kernel(rows, config):
        return kernel_loss(kernels, logits, rows, config, out)
    found = statistics()
    terms = policy_terms(found.logp, found.entropy, rows, config, reduce=kernels.segment_reduce)
    if out is not None:
        bonus = terms.entropy_slope
        kernels.token_logprob_bwd(
            terms.slope,
            bonus,
            logits,
            rows.targets,
            found.lse,
            None if bonus is None else found.entropy,
            out=out,
            **options,
        )
    return block_result(found.logp, found.entropy, found.other_squares, terms, rows)
