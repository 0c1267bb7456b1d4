"""Floating-point operations of one GRPO step, by layout: what padding, packing and a shared prompt
cost before anything runs.

    linears   2 x (weights of the layers) x tokens through the trunk
    attention 4 x heads x head size x layers x (query, key) pairs
    head      2 D V x completion tokens

Training costs 3x the linears (forward, d input, d weight), 3.5x the attention (a flash backward
makes its scores again: five products after two) and 3x the head, whose gradient is made in the
forward; other trainers differ (`Passes`). Norms, activations and the optimizer are not counted. A
prompt that is forwarded once for completions in several rows (chunks) costs what a shared one does.

Letters: `P` prompt tokens, `C` tokens of one completion, `G` completions of the group, `D` hidden,
`V` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .model_shapes import ModelShape

Layout = Literal["padded", "packed", "shared"]


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


class Passes(NamedTuple):
    """Forward and backward in units of the forward."""

    linears: float = 3
    attention: float = 3.5
    head: float = 3


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

    def training(self, layout: Layout, passes: Passes = Passes()) -> Flops:  # noqa: B008 - frozen
        """Forward and backward."""
        work, model = self.work(layout), self.model
        width = model.heads * model.head_dim * model.layers
        head = 2 * model.hidden * model.vocabulary * sum(self.completions)
        return Flops(
            linears=int(passes.linears * 2 * model.body * work.tokens),
            attention=int(passes.attention * 4 * width * work.pairs),
            head=int(passes.head * head),
        )

    def speedup(self, layout: Layout) -> float:
        """How many times as fast as padded a step would be at one rate of operations."""
        return self.training("padded").total / self.training(layout).total
