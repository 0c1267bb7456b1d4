"""Sampling in process, with the weights that are trained: a prompt is read once for its whole
group.

Shapes: `P` prompts, `G` completions per prompt, `S = P*G` rows, `V` vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError

# Rows that are done leave once they are this share of the batch: each departure copies the cache.
LEAVE_SHARE = 1 / 8


class Sample(NamedTuple):
    token_ids: list[int]
    """End-of-sequence token included."""
    logprobs: list[float]
    """log_softmax(logits / temperature) of each token, before top_p."""
    finished: bool
    """Ended by itself, not by max_new_tokens."""


@torch.inference_mode()
def generate(
    model,
    prompt_ids: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
) -> list[list[Sample]]:
    """`group_size` continuations of each prompt, in order; temperature 0 is greedy.

    Prompts of different lengths are padded on the left and read in one forward of P rows; their
    cache is then repeated for P*G rows, which leave the batch as they finish. One uniform number a
    row and step, whether the row still lives or not: what a row samples does not depend on others.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        state = _prefill(model, prompt_ids, group_size, pad_token_id, device)
        tokens, logprobs, lengths, finished = _decode(
            model,
            state,
            rows=len(prompt_ids) * group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            ends=torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device),
            generator=generator,
        )
    finally:
        model.train(was_training)
    samples = [
        Sample(ids[:length], values[:length], done)
        for ids, values, length, done in zip(
            tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True
        )
    ]
    return [samples[p : p + group_size] for p in range(0, len(samples), group_size)]


class _State:
    """What the rows still alive carry from one token to the next."""

    def __init__(self, cache: Any, logits: Tensor, mask: Tensor | None, positions: Tensor):
        self.cache = cache
        self.logits = logits
        self.mask = mask
        self.positions = positions

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.cache.batch_select_indices(rows)
        self.logits = self.logits[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.positions = self.positions[rows]

    def forward(self, model, token: Tensor) -> None:
        """Read one token a row: [rows]."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        output = model(
            input_ids=token[:, None],
            attention_mask=self.mask,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = output.logits[:, -1]
        self.positions = self.positions + 1


def _prefill(
    model, prompt_ids: Sequence[Sequence[int]], group_size: int, pad: int, device: torch.device
) -> _State:
    """Read every prompt once and repeat what it left behind for its group."""
    from transformers import DynamicCache

    lengths = torch.tensor([len(ids) for ids in prompt_ids], device=device)
    longest = int(lengths.max())
    padded = [[pad] * (longest - len(ids)) + list(ids) for ids in prompt_ids]
    columns = torch.arange(longest, device=device)
    mask = (columns >= longest - lengths[:, None]).long()
    cache = DynamicCache(config=model.config)
    output = model(
        input_ids=torch.tensor(padded, device=device),
        # without padding the mask is only the causal one, which attention knows by itself
        attention_mask=None if bool(mask.all()) else mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    if not hasattr(cache, "batch_select_indices"):
        raise ConfigError(
            f"{type(model).__name__} keeps its state in a {type(cache).__name__}, which cannot be "
            "repeated and cut row by row: sampling needs a model with a plain key-value cache"
        )
    cache.batch_repeat_interleave(group_size)
    return _State(
        cache,
        output.logits[:, -1].repeat_interleave(group_size, dim=0),
        None if bool(mask.all()) else mask.repeat_interleave(group_size, dim=0),
        lengths.repeat_interleave(group_size),
    )


def _decode(
    model,
    state: _State,
    *,
    rows: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    ends: Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens [S, max_new_tokens], their log-probs, lengths [S], finished [S])."""
    device = state.logits.device
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(rows, max_new_tokens, device=device)
    lengths = torch.full((rows,), max_new_tokens, device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    alive = torch.arange(rows, device=device)
    for step in range(max_new_tokens):
        uniform = torch.rand(rows, generator=generator, device=device)
        token, logprob = sample(state.logits, uniform[alive], temperature, top_p)
        fresh = ~finished[alive]
        tokens[alive, step] = token
        logprobs[alive, step] = logprob
        ended = fresh & torch.isin(token, ends)
        lengths[alive[ended]] = step + 1
        finished[alive[ended]] = True
        going = ~finished[alive]
        left = int(going.sum())
        if left == 0 or step == max_new_tokens - 1:
            break
        if len(alive) - left >= LEAVE_SHARE * len(alive):
            kept = going.nonzero()[:, 0]
            alive, token = alive[kept], token[kept]
            state.select(kept)
        state.forward(model, token)
    return tokens, logprobs, lengths, finished


def sample(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """`multinomial(softmax(logits / temperature))` by the inverse of its distribution function.

    logits [rows, V], uniform [rows] in [0, 1) -> (token [rows], log-prob [rows] before top_p).
    top_p keeps the smallest set of tokens whose probability reaches it, at least one.
    """
    logps = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logps.argmax(-1)
    else:
        probs = logps.exp()
        if top_p < 1:
            ranked, order = probs.sort(dim=-1, descending=True)
            before = ranked.cumsum(-1) - ranked
            ranked = torch.where(before < top_p, ranked, 0.0)
            probs = torch.zeros_like(probs).scatter_(1, order, ranked)
        reached = probs.cumsum(-1)
        total = reached[:, -1:]
        # Rounding must not lift the mark to the total, behind which only impossible tokens stand.
        mark = torch.minimum(
            uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total))
        )
        token = torch.searchsorted(reached, mark, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, logps.gather(1, token[:, None])[:, 0]
