"""`grpo-fast parity`: the loss of a trainer installed here and ours on one random batch, and
whether it is safe to switch.

Shapes: `S` sequences, `L` padded length, `D` hidden, `V` vocabulary.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from grpo_fast import LossConfig, linear_grpo_loss
from grpo_fast.errors import ConfigError
from grpo_fast.integrations import liger, verl
from grpo_fast.testing import random_sequences

from . import hosts
from .isolated import Call, measured
from .options import Parser

DESCRIPTION = """\
Compute the loss of one random batch by a trainer installed here and by grpo-fast: log-probs, loss,
gradients and metrics side by side, and the time and memory of one call. Exit code 0: safe to
switch; 1: not, a line says why; 2: a wrong option, or no such trainer here."""
PACKAGES = {"trl": "trl", "liger": "liger-kernel", "verl": "verl"}
# S, L, D, V: large enough for sums to round, small enough for a laptop.
SHAPE = (8, 64, 128, 4096)
# Of the largest entry: float32 sums over the vocabulary in another order.
LIMIT = 1e-4
BETA, TEMPERATURE = 0.1, 0.7

Batch = Mapping[str, Tensor]
Result = dict[str, Tensor]
Side = Callable[[Batch], Result]
"""What one of the two makes of the batch, by the name of the quantity."""


def batch() -> Batch:
    """Arguments of a loss in float32, with zeros under the mask."""
    made = random_sequences(*SHAPE, seed=1)
    mask = made["mask"]
    made = {name: made[name] for name in made.keys() - {"sampler_logprobs", "group_ids"}}
    made["targets"] = made["targets"].clamp(min=0)
    for name in ("old_logprobs", "ref_logprobs"):
        made[name] = made[name].masked_fill(~mask, 0.0)
    return made


def leaves(given: Batch) -> tuple[Tensor, Tensor]:
    return tuple(given[name].clone().requires_grad_() for name in ("hidden", "weight"))


def result(loss: Tensor, hidden: Tensor, weight: Tensor, metrics: Mapping[str, Any]) -> Result:
    slopes = torch.autograd.grad(loss, (hidden, weight))
    named = {f"metric {name}": torch.as_tensor(value) for name, value in metrics.items()}
    gradients = {"gradient of hidden": slopes[0], "gradient of head": slopes[1]}
    return {"loss": loss.detach()} | gradients | named


def trl_sides() -> tuple[Side, Side]:
    """`GRPOTrainer._compute_loss` on eager log-probs, and `LossConfig.from_trl`."""
    args = hosts.trl_config(loss_type="dapo", beta=BETA, temperature=TEMPERATURE)
    names = ("kl", "entropy", "clip_ratio/region_mean")

    def theirs(given: Batch) -> Result:
        trainer = hosts.trl_trainer(args)
        hidden, weight = leaves(given)
        logp, entropy = hosts.log_probs(hidden, weight, given["targets"], TEMPERATURE)
        loss = hosts.trl_loss(trainer)(logp, entropy, given)
        metrics = {name: trainer._metrics["train"][name][-1] for name in names}
        found = {"log-probs": (logp * given["mask"]).detach()}
        return found | result(loss, hidden, weight, metrics)

    def ours(given: Batch) -> Result:
        hidden, weight = leaves(given)
        rest = {name: given[name] for name in given.keys() - {"hidden", "weight"}}
        output = linear_grpo_loss(hidden, weight, **rest, config=LossConfig.from_trl(args))
        metrics = {name: output.metrics[name] for name in names}
        return {"log-probs": output.logprobs} | result(output.loss, hidden, weight, metrics)

    return theirs, ours


def liger_sides() -> tuple[Side, Side]:
    """The two classes of one name."""

    def side(cls: type) -> Side:
        def run(given: Batch) -> Result:
            hidden, weight = leaves(given)
            module = cls(compiled=False, beta=BETA, temperature=TEMPERATURE)
            loss, (kl, clipped) = module(
                hidden,
                weight,
                given["targets"],
                given["mask"].float(),
                given["advantages"],
                ref_per_token_logps=given["ref_logprobs"],
                old_per_token_logps=given["old_logprobs"],
            )
            return result(loss, hidden, weight, {"kl": kl, "clip_ratio": clipped})

        return run

    theirs = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    return side(theirs), side(liger.LigerFusedLinearGRPOLoss)


def verl_sides() -> tuple[Side, Side]:
    """verl's fused head and `vanilla`, and the two that take their place."""
    core = hosts.verl_core()
    functional = importlib.import_module("verl.utils.experimental.torch_functional")

    def side(head: type, policy_loss: Callable[..., Any]) -> Side:
        def run(given: Batch) -> Result:
            hidden, weight = leaves(given)
            logp, entropy = head()(hidden, weight, given["targets"], TEMPERATURE)
            loss, metrics = policy_loss(
                old_log_prob=given["old_logprobs"],
                log_prob=logp,
                advantages=given["advantages"][:, None].expand_as(logp),
                response_mask=given["mask"],
                loss_agg_mode="token-mean",
                config=hosts.verl_config(),
            )
            found = {"log-probs": logp.detach(), "entropy": entropy.detach()}
            return found | result(loss, hidden, weight, metrics)

        return run

    theirs = side(functional.FusedLinearForPPO, core.get_policy_loss_fn("vanilla"))
    return theirs, side(verl.FusedLinearForPPO, verl.policy_loss("vanilla"))


SIDES = {"trl": trl_sides, "liger": liger_sides, "verl": verl_sides}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest one, over the largest entry; inf where only one of them is finite."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
    return gap if gap == gap else float("inf")


def compared(sides: tuple[Side, Side]) -> tuple[dict[str, float], list[Call]]:
    """Differences by quantity, and what one call takes: theirs, ours; each was called once
    before."""
    given, calls, found = batch(), [], []
    for side in sides:
        side(given)
        call, values = measured(lambda side=side: side(given), torch.device("cpu"))
        calls.append(call)
        found.append(values)
    theirs, ours = found
    return {name: difference(ours[name], value) for name, value in theirs.items()}, calls


def main(argv: list[str]) -> int:
    """Exit code: 0 safe to switch, 1 not."""
    command = Parser("grpo-fast parity", DESCRIPTION)
    command.add_argument("--host", choices=PACKAGES, required=True, help="the trainer to compare")
    host = command.parse_args(argv).host
    package = PACKAGES[host]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"{package} is not installed: pip install {package}") from None
    try:
        sides = SIDES[host]()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{package} {version} is not as this was written for ({error}): docs/integrations.md "
            "names the versions that are"
        ) from error
    gaps, calls = compared(sides)
    shape = " ".join(f"{k}={n}" for k, n in zip("SLDV", SHAPE, strict=True))
    print(f"{package} {version} and grpo-fast, float32, {shape}: relative difference, at most")
    for name, gap in gaps.items():
        print(f"  {name:<32} {gap:.1e}{'' if gap <= LIMIT else '  <- too large'}")
    for who, call in zip((package, "grpo-fast"), calls, strict=True):
        extra = "not measured" if call.extra is None else f"{call.extra / 2**20:.0f} MiB"
        print(f"  {who:<32} {call.seconds:.3f} s, memory beyond the inputs: {extra}")
    wrong = [name for name, gap in gaps.items() if gap > LIMIT]
    if wrong:
        print(f"not safe to switch: {', '.join(wrong)} differ by more than {LIMIT:.0e}")
        return 1
    print(f"safe to switch: every quantity is {package}'s within {LIMIT:.0e}")
    return 0
