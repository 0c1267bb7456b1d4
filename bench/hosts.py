"""The losses of TRL, verl and Liger, as installed, each as a function of one batch.

`make test` puts them into `PEERS`, apart from the packages of the venv (tests/parity/peers.txt).
Shapes: `S` sequences, `L` padded length, `D` hidden, `V` vocabulary.
"""

import ast
import importlib
import importlib.util
import inspect
import math
import sys
import textwrap
import types
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast import linear_grpo_loss
from grpo_fast.loss_config import LossConfig
from grpo_fast.testing import random_sequences

PEERS = Path(sys.prefix) / "peers"
if str(PEERS) not in sys.path:
    # Last, so that everything the venv has is the venv's.
    sys.path.append(str(PEERS))

Batch = Mapping[str, Tensor]


class Outcome(NamedTuple):
    """A loss and its gradients in hidden [S, L, D] and weight [V, D]."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor


class Gap(NamedTuple):
    """How far two outcomes are apart."""

    value: float
    """Of the losses, which are of order 0.1."""
    gradient: float
    """The largest one of an entry, over the largest entry."""


class Trap(NamedTuple):
    """One name with two meanings, and the number by which they differ."""

    what: str
    there: float
    here: float
    measure: Callable[[], tuple[Any, Any]]
    """(there, here), measured."""


def random_batch(*, old_gap: float = 0.9) -> Batch:
    """Arguments of `linear_grpo_loss` in float64: six ragged sequences, the first without a live
    token, the last advantage 0, NaN and inf under the mask.

    The old policy is `old_gap` nats away, by default far enough for every clip; the reference 0.5,
    and the sampler 0.1 from the old policy.
    """
    # A seed with enough tokens of either sign beyond every bound.
    batch = random_sequences(6, 9, 8, 17, torch.float64, seed=3)
    logp, _ = log_probs(batch["hidden"], batch["weight"], batch["targets"])
    noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(3), dtype=logp.dtype)
    old = logp + old_gap / 0.3 * (batch["old_logprobs"] - logp)
    # What a sampler could not have drawn has no loss.
    batch["old_logprobs"] = old.clamp(max=-1e-4)
    batch["sampler_logprobs"] = (old + 0.1 * noise).clamp(max=-1e-4)
    batch["advantages"] = batch["advantages"].double()
    batch["advantages"][-1] = 0.0
    return batch


def even_batch(
    lengths: tuple[int, ...],
    advantages: tuple[float, ...],
    *,
    width: int = 0,
    p: float = 0.5,
    log_ratio: float = 0.0,
    ref_gap: float = 0.0,
) -> Batch:
    """Sequences of equal tokens, each of probability `p`: a loss that can be worked out by hand.

    log_ratio = policy - old, ref_gap = policy - reference.
    """
    width = width or max(lengths)
    likely = torch.tensor([p, *[(1 - p) / 3] * 3], dtype=torch.float64).log()
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    logp = mask.double() * 0 + likely[0]
    return {
        "hidden": likely.expand(*mask.shape, 4),
        "weight": torch.eye(4, dtype=torch.float64),
        "targets": mask.long() * 0,
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "mask": mask,
        "old_logprobs": logp - log_ratio,
        "ref_logprobs": logp - ref_gap,
    }


def log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Eager log-probs of the targets and entropies, [S, L]."""
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    logp = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return logp, -(log_p.exp() * log_p).sum(-1)


def ours(batch: Batch, config: LossConfig, **keywords: Any) -> Outcome:
    """`linear_grpo_loss` of the batch."""
    batch = dict(batch)
    hidden, weight = (batch.pop(name).clone().requires_grad_() for name in ("hidden", "weight"))
    loss = linear_grpo_loss(hidden, weight, **batch, config=config, **keywords).loss
    return outcome(loss, hidden, weight)


def theirs(batch: Batch, loss: Callable[..., Tensor], temperature: float = 1.0) -> Outcome:
    """`loss(logp, entropy, batch)`, of a trainer that is handed log-probs and entropies."""
    batch = {name: _finite(tensor, batch["mask"]) for name, tensor in batch.items()}
    hidden, weight = (batch[name].clone().requires_grad_() for name in ("hidden", "weight"))
    default = torch.get_default_dtype()
    # Peers make constants in the default dtype: torch.where(condition, 1.0, 1.05) is float32.
    torch.set_default_dtype(hidden.dtype)
    try:
        logp, entropy = log_probs(hidden, weight, batch["targets"], temperature)
        return outcome(loss(logp, entropy, batch), hidden, weight)
    finally:
        torch.set_default_dtype(default)


def _finite(tensor: Tensor, mask: Tensor) -> Tensor:
    """Zeros under the mask: trainers multiply by it, so that NaN would stay."""
    if tensor.shape != mask.shape or not tensor.is_floating_point():
        return tensor
    return tensor.masked_fill(~mask, 0.0)


def outcome(loss: Tensor, hidden: Tensor, weight: Tensor) -> Outcome:
    return Outcome(loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def gap(one: Outcome, other: Outcome) -> Gap:
    pairs = ((one.hidden, other.hidden), (one.weight, other.weight))
    gradient = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return Gap(float((one.loss - other.loss).abs()), gradient)


def trl_config(**options: Any) -> Any:
    """A GRPOConfig that needs no GPU."""
    from trl import GRPOConfig

    return GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, **options)


def trl_trainer(args: Any) -> Any:
    """A GRPOTrainer without model and data: it has what its loss reads, as its `__init__` sets
    that."""
    from accelerate import Accelerator
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = GRPOTrainer.__new__(GRPOTrainer)
    names = """beta loss_type importance_sampling_level off_policy_mask_threshold use_vllm
    vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min top_entropy_quantile
    entropy_coef use_adaptive_entropy max_completion_length scale_rewards num_generations
    multi_objective_aggregation"""
    for name in names.split():
        setattr(trainer, name, getattr(args, name))
    trainer.args = args
    trainer.accelerator = Accelerator(cpu=True)
    trainer.model = types.SimpleNamespace(training=True)
    trainer.epsilon_low = args.epsilon
    trainer.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    trainer.aux_loss_enabled = False
    trainer._entropy_bonus_enabled = args.entropy_coef != 0 or args.use_adaptive_entropy
    trainer._last_world_entropy, trainer._entropy_window_stats = math.inf, None
    trainer._metrics = {"train": defaultdict(list)}
    return trainer


def trl_loss(trainer: Any, **more: Any) -> Callable[..., Tensor]:
    """`GRPOTrainer._compute_loss` with log-probs in place of a model; `more` replaces inputs."""

    def loss(logp: Tensor, entropy: Tensor, batch: Batch) -> Tensor:
        mask = batch["mask"]
        inputs = {
            "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
            "completion_ids": batch["targets"],
            "completion_mask": mask.long(),
            "advantages": batch["advantages"],
            "num_items_in_batch": mask.sum(),
        }
        for there, name in (("old", "old"), ("ref", "ref"), ("sampling", "sampler")):
            if f"{name}_logprobs" in batch:
                inputs[f"{there}_per_token_logps"] = batch[f"{name}_logprobs"]
        if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
            inputs["importance_sampling_ratio"] = trl_sampling_ratio(trainer, inputs)
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, entropy, None)
        return trainer._compute_loss(trainer.model, inputs | more)

    return loss


def trl_sampling_ratio(trainer: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What TRL makes of the sampler's log-probs in the middle of generation."""
    scope = {"self": trainer, "tool_mask": None, **inputs}
    method = type(trainer)._generate_and_score_completions
    lines = run_lines(method, "if self.use_vllm", holding="torch.exp(logps_diff)", scope=scope)
    return lines["vllm_importance_sampling_ratio"]


def run_lines(
    method: Callable, first: str, *, scope: dict[str, Any], holding: str = "", last: str = ""
) -> dict[str, Any]:
    """Run a few lines of a method that does too much to be called; its variables afterwards.

    They are the innermost statements from one that starts with `first` and has `holding` in it to
    one that starts with `last`, or that one alone.
    """
    method = inspect.unwrap(method)
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    for node in reversed(list(ast.walk(tree))):
        body = getattr(node, "body", None)
        lines = [ast.unparse(line) for line in body] if isinstance(body, list) else []
        starts = [k for k, line in enumerate(lines) if line.startswith(first) and holding in line]
        if starts:
            lines = lines[starts[0] :]
            ends = [k for k, line in enumerate(lines) if last and line.startswith(last)]
            code = "\n".join(lines[: (ends or [0])[0] + 1])
            variables = vars(sys.modules[method.__module__]) | scope
            exec(compile(code, inspect.getfile(method), "exec"), variables)
            return variables
    raise LookupError(f"{method.__qualname__} has no line that starts with {first!r}")


class DataProto:
    """verl's carrier of tensors, without Ray."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.batch = tensors

    from_dict = classmethod(lambda cls, tensors: cls(tensors))


@cache
def verl_core() -> types.ModuleType:
    """`verl.trainer.ppo.core_algos` as installed. verl's root package, its transport and its
    profiler import Ray, so of these three only what the losses need is there."""

    spec = importlib.util.find_spec("verl")
    root = Path(next(iter(spec.submodule_search_locations or ())))

    def package(name: str, **members: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        vars(module).update(members)
        sys.modules[name] = module
        return module

    package("verl")
    package("verl.protocol", DataProto=DataProto)
    profiler = package("verl.utils.profiler")
    config = importlib.import_module("verl.utils.profiler.config")
    profiler.ProfilerConfig = config.ProfilerConfig
    return importlib.import_module("verl.trainer.ppo.core_algos")


def verl_config(*, policy_loss: dict[str, Any] | None = None, **options: Any) -> Any:
    """An ActorConfig; `policy_loss` are options of its PolicyLossConfig."""
    verl_core()
    from verl.workers.config import ActorConfig, PolicyLossConfig

    needed = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    needed["global_batch_info"] = dict(options.pop("global_batch_info", {}))
    return ActorConfig(**needed, policy_loss=PolicyLossConfig(**policy_loss or {}), **options)


def verl_loss(cfg: Any, rollout_correction: Any = None) -> Callable[..., Tensor]:
    """verl's `ppo_loss`: policy term, KL and entropy, each by the function it calls."""
    core = verl_core()
    cfg.global_batch_info["loss_scale_factor"] = cfg.loss_scale_factor
    helper = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")

    def loss(logp: Tensor, entropy: Tensor, batch: Batch) -> Tensor:
        mask = batch["mask"]
        keywords = {}
        if rollout_correction is not None:
            gap = batch["old_logprobs"] - batch["sampler_logprobs"]
            keywords["rollout_is_weights"], _ = helper.compute_rollout_correction_weights(
                gap, mask, **rollout_correction
            )
        total, _ = core.get_policy_loss_fn(cfg.policy_loss.loss_mode)(
            old_log_prob=batch["old_logprobs"],
            log_prob=logp,
            advantages=batch["advantages"][:, None].expand_as(logp),
            response_mask=mask,
            loss_agg_mode=cfg.loss_agg_mode,
            config=cfg,
            **keywords,
        )

        def add_up(rows: Tensor) -> Tensor:
            return core.agg_loss(rows, mask, cfg.loss_agg_mode, **cfg.global_batch_info)

        if cfg.entropy_coeff:
            total = total - cfg.entropy_coeff * add_up(entropy)
        if cfg.use_kl_loss:
            kl = core.kl_penalty(logp, batch["ref_logprobs"], cfg.kl_loss_type)
            total = total + cfg.kl_loss_coef * add_up(kl)
        return total

    return loss


def liger_loss(batch: Batch, *, num_items_in_batch: int | None = None, **options: Any) -> Outcome:
    """LigerFusedLinearGRPOLoss, not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    batch = {name: _finite(tensor, batch["mask"]) for name, tensor in batch.items()}
    hidden, weight = (batch[name].clone().requires_grad_() for name in ("hidden", "weight"))
    module = LigerFusedLinearGRPOLoss(compiled=False, **options)
    loss, _ = module(
        hidden,
        weight,
        batch["targets"].clamp(min=0),
        batch["mask"].to(hidden.dtype),
        batch["advantages"],
        ref_per_token_logps=batch.get("ref_logprobs"),
        old_per_token_logps=batch.get("old_logprobs"),
        num_items_in_batch=num_items_in_batch,
    )
    return outcome(loss, hidden, weight)
