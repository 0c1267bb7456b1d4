"""Who makes the forward and backward of one GRPO step: one table, a padded batch, ours and TRL's.

Letters: `P` prompt tokens, `C` tokens of one completion, `G` completions of one prompt, `L = P + C`
padded length. Everybody is given the same random model and group and computes the loss of LOSS with
its gradient in every parameter; nobody updates anything or recomputes activations.
"""

import importlib
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from grpo_fast import Group, LossConfig, grpo_backward, linear_grpo_loss
from grpo_fast.cost import Layout
from grpo_fast.model import hidden_states
from grpo_fast.model_shapes import MODELS
from grpo_fast.tiny import tiny_tokenizer

from .models import model_config
from .provider import Provider
from .timing import dtype_name

LOSS = LossConfig(loss_type="dapo", epsilon=0.2, epsilon_high=0.28)
CPU = torch.device("cpu")
Lengths = Literal["fixed", "lognormal"]
# Of the logarithm; the longest of 16 is then about twice the mean.
SIGMA = 0.5
# Micro-batches of those who cut the padded batch, where nobody says.
PIECES = 4


@dataclass(frozen=True, kw_only=True)
class StepMatch:
    """What everybody is timed at."""

    shape: tuple[int, int, int]
    """P, C (mean where lengths vary), G."""
    lengths: Lengths = "fixed"
    """`lognormal`: mean C, sigma SIGMA, from 1 to 2 C."""
    model: str = "small"
    """Of MODELS."""
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    pieces: int = PIECES
    """Micro-batches of those who cut the padded batch."""

    def completions(self) -> list[int]:
        """Tokens of each."""
        _, mean, count = self.shape
        if self.lengths == "fixed":
            return [mean] * count
        normal = torch.randn(count, generator=torch.Generator().manual_seed(0))
        drawn = (SIGMA * normal + math.log(mean) - SIGMA**2 / 2).exp()
        return drawn.round().clamp(1, 2 * mean).int().tolist()

    def network(self, dtype: torch.dtype | None = None):
        """The untrained model, the same each time, in `dtype` or the match's own."""
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(model_config(MODELS[self.model]))
        return model.to(self.device, dtype or self.dtype).eval()

    def group(self) -> Group:
        """Random tokens; advantages that do not add up to 0, so that the loss is a number."""
        source = torch.Generator().manual_seed(1)
        # Past the ids of padding and end.
        draw = partial(torch.randint, 3, MODELS[self.model].vocabulary, generator=source)
        return Group(
            prompt_ids=draw((self.shape[0],)).tolist(),
            completion_ids=[draw((length,)).tolist() for length in self.completions()],
            advantages=(torch.randn(self.shape[2], generator=source) + 0.5).tolist(),
        )

    def __str__(self) -> str:
        p, c, g = self.shape
        lengths = "" if self.lengths == "fixed" else f" {self.lengths}"
        return f"P={p} C={c}{lengths} G={g}, {self.model} model, {dtype_name(self.dtype)}"


Step = Callable[[], Tensor]
"""Forward and backward: the loss; gradients add up in the parameters."""
Prepare = Callable[..., Step]
"""(model, group, pieces) -> Step."""


class PaddedGroup(NamedTuple):
    """As trainers hold it; one prompt, so only the right of completions is padded."""

    prompts: Tensor
    """[G, P]."""
    completions: Tensor
    """[G, C of the longest], 0 where padded."""
    mask: Tensor
    """[G, C of the longest] bool."""
    advantages: Tensor
    """[G]."""

    @classmethod
    def of(cls, group: Group, device: torch.device) -> "PaddedGroup":
        rows = [torch.tensor(ids) for ids in group.completion_ids]
        completions = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return cls(
            torch.tensor(group.prompt_ids).expand(len(rows), -1).to(device),
            completions.to(device),
            (torch.arange(completions.shape[1]) < lengths[:, None]).to(device),
            torch.tensor(group.advantages, device=device),
        )

    def cut(self, pieces: int) -> list["PaddedGroup"]:
        """In micro-batches of G / `pieces` sequences."""
        parts = [x.split(-(-len(self.mask) // pieces)) for x in self]
        return [PaddedGroup(*tensors) for tensors in zip(*parts, strict=True)]


def padded(cut: bool = False) -> Prepare:
    """In one batch, or in micro-batches with the loss normalised over all."""

    # No attention mask: what is padded lies behind every token that counts, and without a mask
    # attention is the fast causal call.
    def prepare(model, group: Group, pieces: int = 1) -> Step:
        whole = PaddedGroup.of(group, model.device)
        weight, tokens = model.get_output_embeddings().weight, int(whole.mask.sum())
        batches = whole.cut(pieces if cut else 1)

        def step() -> Tensor:
            total = torch.zeros((), device=model.device)
            for prompts, completions, mask, advantages in batches:
                states = hidden_states(model, torch.cat([prompts, completions], 1))
                loss = linear_grpo_loss(
                    states[:, len(group.prompt_ids) - 1 : -1],
                    weight,
                    completions,
                    advantages,
                    mask=mask,
                    denominator=tokens,
                    config=LOSS,
                ).loss
                loss.backward()
                total += loss.detach()
            return total

        return step

    return prepare


def ours(share_prompts: str, one_row: bool = False) -> Prepare:
    def prepare(model, group: Group, pieces: int = 1) -> Step:
        budget = None
        if one_row:
            budget = len(group.prompt_ids) + sum(map(len, group.completion_ids))

        def step() -> Tensor:
            return grpo_backward(
                model, [group], loss=LOSS, token_budget=budget, share_prompts=share_prompts
            ).loss

        return step

    return prepare


def trl_trainer(
    model, count: int, longest: int, folder: str, kind: type | None = None, beta: float = 0.0
):
    """TRL's trainer, or one of a `kind` derived from it, of `count` completions of at most
    `longest` tokens, nothing trained yet."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=folder,
        use_cpu=model.device.type == "cpu",
        bf16=False,
        per_device_train_batch_size=count,
        num_generations=count,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        max_completion_length=longest,
        beta=beta,
        loss_type=LOSS.loss_type,
        epsilon=LOSS.epsilon,
        epsilon_high=LOSS.epsilon_high,
        report_to="none",
    )
    # With a fingerprint: making one pickles more than some versions can.
    prompts = Dataset(InMemoryTable.from_pydict({"prompt": ["a"] * count}), fingerprint="a")
    trainer = (kind or GRPOTrainer)(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args,
        train_dataset=prompts,
        processing_class=tiny_tokenizer(),
    )
    # As `Trainer.train` sets it.
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl(cut: bool = False) -> Prepare:
    """`GRPOTrainer.compute_loss` and the backward of its accelerator, on inputs that are ready, in
    one batch or in micro-batches.

    In it: everything of TRL's micro-step from token ids to gradients, its chunked head, entropies
    and metrics included. Not in it: generation, rewards, data loader, optimizer, and the gradient
    checkpointing that it has on by default.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    importlib.import_module("trl")

    def prepare(model, group: Group, pieces: int = 1) -> Step:
        whole = PaddedGroup.of(group, model.device)
        batches = whole.cut(pieces if cut else 1)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trl_trainer(model, *whole.completions.shape, folder)
        model.train()
        inputs = [
            {
                "prompt_ids": batch.prompts,
                "prompt_mask": torch.ones_like(batch.prompts),
                "completion_ids": batch.completions,
                "completion_mask": batch.mask.long(),
                "advantages": batch.advantages,
                "num_items_in_batch": whole.mask.sum(),
            }
            for batch in batches
        ]

        def step() -> Tensor:
            total = torch.zeros((), device=model.device)
            for batch in inputs:
                loss = trainer.compute_loss(model, batch)
                trainer.accelerator.backward(loss)
                total += loss.detach()
            return total

        return step

    return prepare


@dataclass(frozen=True, kw_only=True)
class StepProvider(Provider):
    layout: Layout
    """What its operations are counted as."""
    on_request: bool = False
    """Only where --only names it."""


PROVIDERS = (
    StepProvider(
        name="padded",
        computes="one batch padded on the right, transformers' attention, our loss",
        load=padded,
        layout="padded",
    ),
    StepProvider(
        name="accumulated",
        computes="the same in micro-batches (--pieces): less memory, better for caches",
        load=partial(padded, True),
        layout="padded",
    ),
    StepProvider(
        name="packed",
        computes="grpo_backward(share_prompts='off'): no padding, a prompt a completion",
        load=partial(ours, "off"),
        layout="packed",
    ),
    StepProvider(
        name="shared",
        computes="grpo_backward(share_prompts='on'): the prompt once",
        load=partial(ours, "on"),
        layout="shared",
    ),
    StepProvider(
        name="one row",
        computes="the same with a budget that holds the whole group",
        load=partial(ours, "on", True),
        layout="shared",
    ),
    StepProvider(
        name="TRL",
        computes="GRPOTrainer.compute_loss and backward, one padded batch, no checkpointing",
        load=trl,
        package="trl",
        layout="padded",
    ),
    StepProvider(
        name="TRL accumulated",
        computes="the same in micro-batches (--pieces), asked for with --only",
        load=partial(trl, True),
        package="trl",
        layout="padded",
        on_request=True,
    ),
)


class Exact(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]
    """By parameter."""


def exact_step(match: StepMatch) -> Exact:
    """The oracle: float64, one sequence after the other, eager log-softmax.

    On policy every ratio is 1 and nothing is clipped.
    """
    model, group = match.network(torch.float64), match.group()
    total = sum(len(ids) for ids in group.completion_ids)
    prompt, loss = torch.tensor(group.prompt_ids, device=model.device), 0.0
    for ids, advantage in zip(group.completion_ids, group.advantages, strict=True):
        targets = torch.tensor(ids, device=model.device)
        states = hidden_states(model, torch.cat([prompt, targets])[None])[0, len(prompt) - 1 : -1]
        logps = model.get_output_embeddings()(states).log_softmax(-1)
        logp = logps.gather(1, targets[:, None])
        part = -advantage * (logp - logp.detach()).exp().sum() / total
        part.backward()
        loss = loss + part.detach()
    return Exact(loss, gradients(model))


def gradients(model) -> dict[str, Tensor]:
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def loss_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs() / exact.abs())


def gradient_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest of all parameters: norm of the difference over norm."""
    missing = exact.keys() ^ found.keys()
    assert not missing, f"gradients of {', '.join(sorted(missing))} on one side only"
    return max(
        float((found[name].double() - truth).norm() / truth.norm()) for name, truth in exact.items()
    )
