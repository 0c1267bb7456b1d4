"""Sampling: each prompt is read once, its keys and values serve its G completions, finished rows
leave the batch.

Shapes: `P` prompts, `G` completions per prompt, `S = P*G` rows, `N` rows still alive, `L` padded
prompt length, `V` vocabulary.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, GrpoFastError, InputError
from .model import evaluating

# Probabilities looked at in one go: float64 sums over [N, V] would outweigh the model.
ENTRIES_PER_CHUNK = 2**25


@dataclass(slots=True)
class Sample:
    """One completion."""

    token_ids: list[int]
    """The end-of-sequence token included, if it came."""
    logprobs: list[float]
    """`log_softmax(logits / temperature)` of each token, before top_p."""
    finished: bool
    """It ended by itself, not at max_new_tokens."""


@torch.inference_mode()
def generate(
    model,
    prompt_ids: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[list[Sample]]:
    """`group_size` completions of each of P prompts, in the order of the prompts.

    Temperature 0 is greedy, with the log-probs of temperature 1. Every step draws one float64 of
    `generator` for each of the S rows, alive or not, so that no row's randomness depends on
    another. `on_token` gets N, the rows alive, once a step. Raises InputError for a bad prompt,
    ConfigError for a bad option or a model whose cache cannot give up rows.
    """
    _check_options(group_size, max_new_tokens, temperature, top_p)
    if not prompt_ids:
        return []
    _check_prompts(model, prompt_ids)
    choose = _Chooser(len(prompt_ids) * group_size, temperature, top_p, generator)
    with evaluating(model):
        state = _prefill(model, prompt_ids, group_size, max_new_tokens, pad_token_id)
        end = torch.tensor(list(eos_token_ids), dtype=torch.long, device=state.rows.device)
        return _groups(_decode(model, state, choose, end, max_new_tokens, on_token), group_size)


@dataclass(slots=True)
class _State:
    """Rows still alive."""

    rows: Tensor
    """[N] which of the S completions each one is."""
    logits: Tensor
    """[N, V] of the next token."""
    mask: Tensor
    """[N, L + max_new_tokens]: 0 on the padding left of the prompt."""
    positions: Tensor
    """[N] of the next token."""
    length: int
    """Tokens in the cache, padding included."""
    cache: object

    def keep(self, alive: Tensor) -> None:
        """Drop all rows but `alive` [<= N], indices in order."""
        self.rows, self.mask = self.rows[alive], self.mask[alive]
        self.positions = self.positions[alive]
        self.cache.batch_select_indices(alive)


def _prefill(model, prompt_ids, group_size: int, max_new_tokens: int, pad_token_id: int) -> _State:
    """Read every prompt once, then repeat its cache for its completions."""
    device = next(model.parameters()).device
    longest = max(map(len, prompt_ids))
    ids = torch.full((len(prompt_ids), longest), pad_token_id, dtype=torch.long)
    mask = torch.ones(len(prompt_ids), longest + max_new_tokens, dtype=torch.long)
    for row, prompt in enumerate(prompt_ids):
        padding = longest - len(prompt)
        ids[row, padding:] = torch.tensor(prompt)
        mask[row, :padding] = 0
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask[:, :longest].cumsum(1) - 1).clamp(min=0)
    output = model(
        input_ids=ids,
        attention_mask=mask[:, :longest],
        position_ids=positions,
        use_cache=True,
        **_last_logits_only(model),
    )
    cache = getattr(output, "past_key_values", None)
    _check_cache(model, cache)
    cache.batch_repeat_interleave(group_size)
    return _State(
        rows=torch.arange(len(prompt_ids) * group_size, device=device),
        logits=output.logits[:, -1].repeat_interleave(group_size, 0),
        mask=mask.repeat_interleave(group_size, 0),
        positions=(positions[:, -1] + 1).repeat_interleave(group_size),
        length=longest,
        cache=cache,
    )


def _decode(
    model,
    state: _State,
    choose: "_Chooser",
    end: Tensor,
    max_new_tokens: int,
    on_token: Callable[[int], None] | None,
) -> list[Sample]:
    """One token a step for every row alive."""
    total, device = len(state.rows), state.rows.device
    tokens = torch.zeros(total, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(total, max_new_tokens, device=device)
    lengths = torch.full((total,), max_new_tokens, device=device)
    finished = torch.zeros(total, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        if on_token is not None:
            on_token(len(state.rows))
        token, logprob = choose(state.logits, state.rows)
        tokens[state.rows, step], logprobs[state.rows, step] = token, logprob
        ended = torch.isin(token, end)
        # One transfer a step for both questions.
        any_ended, any_nan = torch.stack([ended.any(), logprob.isnan().any()]).tolist()
        if any_nan:
            raise GrpoFastError(
                f"the model's logits are NaN at completion token {step}: its weights are damaged "
                "or training diverged; go back to an earlier checkpoint or lower learning_rate"
            )
        if any_ended:
            lengths[state.rows[ended]], finished[state.rows[ended]] = step + 1, True
            alive = (~ended).nonzero()[:, 0]
            token = token[alive]
            state.keep(alive)
        if step + 1 == max_new_tokens or len(state.rows) == 0:
            break
        _advance(model, state, token)
    table = zip(
        tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True
    )
    return [Sample(ids[:n], values[:n], done) for ids, values, n, done in table]


def _advance(model, state: _State, token: Tensor) -> None:
    """Logits after `token` [N]."""
    state.length += 1
    output = model(
        input_ids=token[:, None],
        attention_mask=state.mask[:, : state.length],
        position_ids=state.positions[:, None],
        past_key_values=state.cache,
        use_cache=True,
    )
    state.logits = output.logits[:, -1]
    state.positions = state.positions + 1


class _Chooser:
    """Logits [N, V] and rows [N] to sampled tokens [N] and their log-probs [N], float32."""

    def __init__(
        self, total: int, temperature: float, top_p: float, generator: torch.Generator | None
    ) -> None:
        self.total = total
        self.temperature = temperature
        self.top_p = top_p
        self.generator = generator

    def __call__(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        noise = None
        if self.temperature > 0:
            source = rows.device if self.generator is None else self.generator.device
            noise = torch.rand(
                self.total, dtype=torch.float64, generator=self.generator, device=source
            ).to(rows.device)[rows]
        chunk = max(1, ENTRIES_PER_CHUNK // logits.shape[1])
        parts = [
            self._choose(logits[k : k + chunk], None if noise is None else noise[k : k + chunk])
            for k in range(0, len(logits), chunk)
        ]
        return torch.cat([token for token, _ in parts]), torch.cat([logp for _, logp in parts])

    def _choose(self, logits: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        logps = (logits.float() / (self.temperature or 1.0)).log_softmax(-1)
        token = logps.argmax(-1) if noise is None else inverse_cdf(logps.exp(), noise, self.top_p)
        return token, logps.gather(1, token[:, None])[:, 0]


def inverse_cdf(probs: Tensor, noise: Tensor, top_p: float = 1.0) -> Tensor:
    """Tokens [N] at which the running sum of `probs` [N, V] passes `noise` [N], uniform in [0, 1).

    With top_p < 1, of the smallest set of most likely tokens whose probability is at least top_p,
    renormalised. Sums are float64: over 150 thousand float32 terms the tail would be lost.
    """
    order = None
    if top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
    mass = probs.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    if order is not None:
        before = torch.cat([torch.zeros_like(total), mass[:, :-1]], 1)
        total = mass.gather(1, (before < top_p).sum(1, keepdim=True) - 1)
    # In float64 the product stays below the total, so that no token of probability 0 is past it;
    # only NaN needs the clamp.
    index = torch.searchsorted(mass, noise[:, None] * total, right=True)
    index = index.clamp(max=probs.shape[1] - 1)
    return (index if order is None else order.gather(1, index))[:, 0]


def _groups(samples: list[Sample], group_size: int) -> list[list[Sample]]:
    return [samples[k : k + group_size] for k in range(0, len(samples), group_size)]


def _last_logits_only(model) -> dict[str, int]:
    """Logits of every prompt position would be [P, L, V]; most models can leave them out."""
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def _check_cache(model, cache: object) -> None:
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    # Exactly these: their subclasses keep more state than the two row operations touch.
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    parts = cache.layers if isinstance(cache, DynamicCache) else [cache]
    odd = [type(part).__name__ for part in parts if type(part) not in known]
    if odd:
        what = "no past_key_values" if cache is None else f"a {odd[0]} in its past_key_values"
        raise ConfigError(
            f"{type(model).__name__} returns {what}, and sampling needs a DynamicCache of plain "
            "attention layers, whose rows can be repeated and dropped: use another model"
        )


def _check_options(group_size: int, max_new_tokens: int, temperature: float, top_p: float) -> None:
    for name, value in (("group_size", group_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ConfigError(f"{name} = {value} is out of range: expected at least 1")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature = {temperature} is out of range: expected >= 0, 0 = greedy")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p = {top_p} is out of range: expected 0 < top_p <= 1")


def _check_prompts(model, prompt_ids: Sequence[Sequence[int]]) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for row, prompt in enumerate(prompt_ids):
        if len(prompt) == 0:
            raise InputError(f"prompt_ids[{row}] is empty: expected at least one token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise InputError(
                f"prompt_ids[{row}] has token {max(prompt)} or {min(prompt)} outside "
                f"[0, {vocabulary}): the tokenizer does not belong to this model"
            )
