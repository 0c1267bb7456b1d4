"""Work, memory and time of one update, from the sizes of a model alone: nothing is loaded.

Compared are `padded`, as TRL 1.16 without checkpointing (every completion behind a prompt of its
own in one batch of the group, logits in tiles that the backward computes again: 4 head products),
and this project under its token budget. Both have the same optimizer and the same eager layers.

    seconds = FLOPs / their rates + bytes of layers and optimizer / bandwidth

Norms, activation functions and rotations do few operations on many bytes; of the head and of what
is counted as weights and gradients, products hide the bytes behind their operations.

Letters: `P` prompt, `C` tokens of each completion, `G` completions of a prompt, `D` hidden, `V`
vocabulary, `N` tokens in the loss.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from .chunked import chunk_rows
from .config import Checkpointing, Optimizer
from .cost import Flops, Layout, Passes, StepCost
from .errors import ConfigError
from .gpus import KEPT, Machine
from .loss_config import LossConfig
from .memory import Need, RowBytes, head_bytes, modes_of
from .model_shapes import ModelShape
from .optimizer import bytes_each
from .packing import LEAST_SAVED, default_budget, pack
from .planner import LEAST_TOKENS, LargestStep, Rows, fastest_rows, largest_rows

Train = Literal["all", "lora"]
# Of an adapter at every matrix of every layer.
LORA_RANK = 16
# Tiles of logits of TRL: 4096 tokens of 32768 words, and what is made of them.
TRL_WORKSPACE = 2**28
# Eager layers move what they keep: written, read by the next one and by the backward, its gradient
# written and read, and a copy of another dtype or shape.
MOVES = 6
# Once more where layers are computed again.
MOVES_AGAIN = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One update."""

    model: ModelShape
    prompt: int
    completion: int
    group_size: int
    prompts: int = 1
    dtype: torch.dtype = torch.bfloat16
    train: Train = "all"
    optimizer: Optimizer = "adamw"

    @property
    def largest(self) -> LargestStep:
        return LargestStep(self.prompts, self.group_size, self.prompt, self.completion)

    @property
    def cost(self) -> StepCost:
        """Of one group."""
        completions = [self.completion] * self.group_size
        return StepCost(model=self.model, prompt=self.prompt, completions=completions)

    @property
    def adapters(self) -> int:
        """Their numbers."""
        return LORA_RANK * self.model.layers * self.model.sides if self.train == "lora" else 0

    def bytes_each(self) -> tuple[int, int]:
        """(gradient, state) of a number that is trained: as `TrainConfig` has it by default, and
        with 8-bit moments rounded stochastically. Adapters are float32."""
        dtype = self.dtype if self.train == "all" else torch.float32
        precision = "master" if self.optimizer == "adamw" else "stochastic"
        return bytes_each(dtype, self.optimizer, precision)

    @property
    def trained(self) -> int:
        return self.model.parameters if self.train == "all" else self.adapters

    def weights(self, device: str) -> int:
        """Bytes. Products of float32 weights on a GPU are made of bfloat16 copies."""
        copies = 2 if device == "cuda" and self.dtype == torch.float32 else 0
        return self.model.parameters * (self.dtype.itemsize + copies) + 4 * self.adapters

    def row(self, workspace: int) -> RowBytes:
        """What memory follows from, when `workspace` bytes hold blocks of logits."""
        model, size = self.model, self.dtype.itemsize
        heads = model.head_dim * (model.heads + model.kv_heads)
        # What enters and leaves a norm and its float32 form, which is twice as wide as 16 bits.
        norms = (3 if size == 4 else 4) * model.normed
        # Queries, keys, values and what attention makes of them; gate, its activation, up, product.
        kept = norms + 2 * heads + 4 * model.intermediate
        head = head_bytes(model.vocabulary, model.hidden, 0) if self.train == "all" else 0
        return RowBytes(
            layers=model.layers,
            state=size * model.hidden,
            kept=size * kept * model.layers,
            # The gradients of the last three.
            backward=size * 3 * model.intermediate,
            fixed=self.trained * self.bytes_each()[0] + head + workspace,
        )


class Memory(NamedTuple):
    """Bytes at the peak."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int


class Moved(NamedTuple):
    """Least bytes through device memory; of the layers what eager modules move."""

    weights: int
    gradients: int
    optimizer: int
    head: int
    layers: int


class Estimate(NamedTuple):
    provider: str
    tokens: int
    """Through the model."""
    token_budget: int
    checkpointing: Checkpointing
    row: int
    """Tokens of the longest row, or of the batch."""
    flops: Flops
    moved: Moved
    memory: Memory
    fits: bool
    largest_group: int | None
    """That fits; None where any does."""
    backward_seconds: float
    """Forward and backward."""
    optimizer_seconds: float

    @property
    def seconds(self) -> float:
        return self.backward_seconds + self.optimizer_seconds


def padded(job: Job, on: Machine, head: float = 4, workspace: int = TRL_WORKSPACE) -> Estimate:
    """`head`: products that its loss takes with a trained head, one less with a frozen one."""
    row, tokens = job.row(workspace), job.group_size * job.largest.sequence
    need = row.need("off")
    most = need.most_tokens(free_for_rows(job, on))
    return _estimate(
        job,
        on,
        layout="padded",
        passes=Passes(3, 3.5, head) if job.train == "all" else Passes(2, 3.5, head - 1),
        row=tokens,
        rows=job.prompts,
        need=need,
        mode="off",
        provider="padded trainer",
        token_budget=tokens,
        fits=most >= tokens,
        largest_group=most // job.largest.sequence,
    )


def ours(
    job: Job,
    on: Machine,
    token_budget: int | None = None,
    checkpointing: Checkpointing = "auto",
) -> Estimate:
    """`token_budget` None: what `plan_memory` would take. Raises ConfigError for one below a
    sequence."""
    sequence, device = job.largest.sequence, torch.device(on.device)
    if token_budget is not None and token_budget < sequence:
        raise ConfigError(
            f"--token-budget {token_budget} is below one sequence of {sequence} tokens: raise it, "
            "or lower --completion"
        )
    default = default_budget(device, job.prompt, job.completion)
    wanted = token_budget or min(default, job.largest.tokens)
    completed = job.prompts * job.group_size * job.completion
    row = job.row(logit_bytes(job.model, min(wanted, completed), device))
    modes = modes_of(device) if checkpointing == "auto" else (checkpointing,)
    chosen = fastest_rows(
        row.need,
        modes,
        free=free_for_rows(job, on),
        wanted=wanted,
        enough=token_budget or min(wanted, max(sequence, LEAST_TOKENS)),
    )
    least = token_budget or sequence
    fits = chosen.token_budget >= least
    if not fits:
        # What the smallest step would take.
        chosen = Rows(least, modes[-1], row.need(modes[-1]))
    budget, again = chosen.token_budget, int(chosen.mode != "off")
    longest = _longest_row(job, budget)
    layout = _layout(job)
    return _estimate(
        job,
        on,
        layout=layout,
        passes=Passes(3 + again, 3.5 + again, 3)
        if job.train == "all"
        else Passes(2 + again, 3.5 + again, 2),
        row=longest,
        rows=-(-job.prompts * job.cost.work(layout).tokens // longest),
        need=chosen.need,
        mode=chosen.mode,
        provider="grpo-fast",
        token_budget=budget,
        fits=fits,
        largest_group=None if fits else 0,
    )


def logit_bytes(model: ModelShape, tokens: int, device: torch.device) -> int:
    """Of the largest float32 block of logits of a row."""
    return 4 * model.vocabulary * min(chunk_rows(model.vocabulary, device), tokens)


def free_for_rows(job: Job, on: Machine) -> int:
    """Bytes beside weights and optimizer."""
    return max(on.memory - job.weights(on.device) - job.trained * job.bytes_each()[1], 0)


def _layout(job: Job) -> Layout:
    """As `pack` decides it."""
    tokens = {layout: job.cost.work(layout).tokens for layout in ("packed", "shared")}
    sees_all = job.model.window is None or job.largest.sequence <= job.model.window
    saved = 1 - tokens["shared"] / tokens["packed"]
    return "shared" if sees_all and saved > LEAST_SAVED else "packed"


def _longest_row(job: Job, budget: int) -> int:
    groups = largest_rows(budget, job.largest, LossConfig())
    return pack(groups, LossConfig(), budget, window=job.model.window).longest


def _estimate(
    job: Job,
    on: Machine,
    *,
    layout: Layout,
    passes: Passes,
    row: int,
    rows: int,
    need: Need,
    mode: Checkpointing,
    **said,
) -> Estimate:
    """Of all groups; `said` is what Estimate has besides."""
    cost, gradient, state = job.cost, *job.bytes_each()
    tokens = job.prompts * cost.work(layout).tokens
    flops = Flops(*(job.prompts * part for part in cost.training(layout, passes)))
    weights, gradients = job.weights(on.device), job.trained * gradient
    memory = Memory(
        weights=weights,
        gradients=gradients,
        optimizer=job.trained * state,
        activations=int(need.per_token * row),
        head=int(need.fixed) - gradients,
    )
    again = mode != "off"
    states = 4 * job.prompts * job.group_size * job.completion * job.model.hidden
    dweight = 2 * head_bytes(job.model.vocabulary, job.model.hidden, 0)
    moved = Moved(
        # Forward and backward; again where layers are computed again.
        weights=(2 + again) * rows * weights,
        # Every row adds to them.
        gradients=2 * rows * gradients,
        optimizer=gradients + 2 * memory.optimizer + 2 * job.trained * job.dtype.itemsize,
        head=job.dtype.itemsize * states + (dweight * rows if job.train == "all" else 0),
        layers=int((MOVES + MOVES_AGAIN * again) * job.row(0).kept * tokens),
    )
    seconds = (flops.linears + flops.head) / on.flops + flops.attention / on.attention
    # The MLP's share of what layers move, and the rest, whose results are smaller.
    mlp = 4 * job.model.intermediate * job.model.layers * job.dtype.itemsize / job.row(0).kept
    for share, width in ((mlp, job.model.intermediate), (1 - mlp, job.model.hidden)):
        large = job.dtype.itemsize * width * row >= KEPT
        seconds += share * moved.layers / (on.anew if large else on.bandwidth)
    return Estimate(
        tokens=tokens,
        row=row,
        flops=flops,
        memory=memory,
        moved=moved,
        checkpointing=mode,
        backward_seconds=seconds / on.reached,
        optimizer_seconds=moved.optimizer / (on.reached * on.bandwidth),
        **said,
    )
