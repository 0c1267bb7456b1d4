"""Floating-point operations of one GRPO step, by layout: what padding, packing and a shared prompt
cost before anything runs.

    linears   2 x (weights of the layers) x tokens through the trunk
    attention 4 x heads x head size x layers x (query, key) pairs
    head      2 D V x completion tokens

Training costs 3x the linears (forward, d input, d weight), 3.5x the attention (a flash backward
makes its scores again: five products after two) and 3x the head, whose gradient is made in the
forward. Norms, activations and the optimizer are not counted. A prompt that is forwarded once for
completions in several rows (chunks) costs what a shared one does.

Letters: `P` prompt tokens, `C` tokens of one completion, `G` completions of the group, `D` hidden,
`V` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .models import ModelShape

Layout = Literal["padded", "packed", "shared"]


def body(model: ModelShape) -> int:
    """Weights of all layers that every token is multiplied by."""
    attention = 2 * model.hidden * model.head_dim * (model.heads + model.kv_heads)
    return model.layers * (attention + 3 * model.hidden * model.intermediate)


class Work(NamedTuple):
    """How often each part of the model is asked."""

    tokens: int
    """Through the trunk."""
    pairs: int
    """Causal (query, key) pairs of one head in one layer."""


class Flops(NamedTuple):
    linears: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)


def causal(count: int) -> int:
    """Pairs of `count` tokens that each see themselves and what is before them."""
    return count * (count + 1) // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """One group: forward and backward of G completions of one prompt.

    `padded` has every sequence padded to the longest, though no logits of padding; `packed` has no
    padding and a prompt for each completion; `shared` has the prompt once. The last two leave a
    completion's last token out: it predicts nothing.
    """

    model: ModelShape
    prompt: int
    """P."""
    completions: Sequence[int]
    """C of each of the G completions."""

    def work(self, layout: Layout) -> Work:
        read = [c - 1 for c in self.completions]
        if layout == "padded":
            rows = [self.prompt + max(self.completions)] * len(read)
        elif layout == "packed":
            rows = [self.prompt + c for c in read]
        else:
            pairs = causal(self.prompt) + self.prompt * sum(read) + sum(map(causal, read))
            return Work(self.prompt + sum(read), pairs)
        return Work(sum(rows), sum(map(causal, rows)))

    def training(self, layout: Layout) -> Flops:
        """Forward and backward, nothing recomputed but attention scores."""
        work, model = self.work(layout), self.model
        width = model.heads * model.head_dim * model.layers
        return Flops(
            linears=3 * 2 * body(model) * work.tokens,
            attention=7 * 2 * width * work.pairs,
            head=3 * 2 * model.hidden * model.vocabulary * sum(self.completions),
        )

    def speedup(self, layout: Layout) -> float:
        """How many times as fast as padded a step would be at one rate of operations."""
        return self.training("padded").total / self.training(layout).total
