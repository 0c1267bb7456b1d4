"""AdamW for parameters of 16 bits: an update far below the spacing of bfloat16 is not lost.

At learning rate 1e-6 AdamW moves a weight by 1e-6 a step, while bfloat16 numbers about 0.02 are
1.2e-4 apart: rounded to nearest, such a weight never moves.

Bytes a bfloat16 parameter, with 2 for the weight:

    update_precision   bytes   what is kept
    master             18      float32 gradient 4, float32 weight 4, float32 moments 4 + 4
    stochastic         12      bfloat16 gradient 2, float32 moments 4 + 4
    none               8       bfloat16 gradient 2, bfloat16 moments 2 + 2
    adamw_8bit         6       bfloat16 gradient 2, 8-bit moments 1 + 1, a float32 scale for each
                               256 of them

A float32 parameter has 16, or 10 with adamw_8bit, which leaves moments of fewer than 4096 numbers
in the parameter's own dtype. A step takes besides, for each of CHUNK numbers and however large the
model, 12 bytes with `master` and 18 with `stochastic`.
"""

import functools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .config import Optimizer, TrainConfig, UpdatePrecision
from .errors import CheckpointError, ConfigError, InputError

# Numbers stepped at once: float32 copies of this many are small beside a model of billions.
CHUNK = 2**24


def check_optimizer(config: TrainConfig) -> None:
    """Raise, before anything is loaded, the ConfigError that `make_optimizer` would raise."""
    if config.optimizer == "adamw_8bit":
        _torchao_adamw()


def make_optimizer(parameters: Iterable[Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """`torch.optim.AdamW([p for p in parameters if p.requires_grad])` in the precision that
    `config` asks for: its optimizer, update_precision, learning_rate, adam_beta1, adam_beta2,
    weight_decay and seed.

    Raises ConfigError where adamw_8bit finds no torchao, InputError for float16 parameters, which
    `stochastic` cannot round.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    options = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.weight_decay,
    }
    stochastic = config.update_precision == "stochastic"
    if config.optimizer == "adamw_8bit":
        return _adamw_8bit(parameters, bf16_stochastic_round=stochastic, **options)
    if config.update_precision == "none" or not any(map(_is_short, parameters)):
        return torch.optim.AdamW(parameters, **options)
    return RoundedAdamW(parameters, master=not stochastic, seed=config.seed, **options)


def state_bytes(parameters: Iterable[Tensor], config: TrainConfig) -> int:
    """What the state of `make_optimizer(parameters, config)` will take: the table above without
    weight and gradient."""
    chosen = config.optimizer, config.update_precision
    return sum(p.numel() * bytes_each(p.dtype, *chosen)[1] for p in parameters if p.requires_grad)


def bytes_each(
    dtype: torch.dtype, optimizer: Optimizer, update_precision: UpdatePrecision
) -> tuple[int, int]:
    """(gradient, state) of one number of a parameter: the table above without the weight."""
    size = dtype.itemsize
    if optimizer == "adamw_8bit":
        return size, 2
    if size != 2 or update_precision == "none":
        return size, 2 * size
    return (4, 12) if update_precision == "master" else (size, 8)


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """`value.to(bfloat16)`, up as often as `value` is near the upper neighbour: right on average.

    value: float32. noise: int32 of the same shape, uniform in [0, 2**16): it is added to the bits
    that bfloat16 drops, and the carry rounds away from zero. A value that bfloat16 holds, inf and
    NaN stay what they are; between the largest bfloat16 and 2**128 the upper neighbour is inf.
    """
    rounded = noise.add(value.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
    # The carry would make another number of a NaN.
    return torch.where(value.isnan(), value, rounded).to(torch.bfloat16)


class Piece(NamedTuple):
    """Rows of one parameter, and of all that belongs to it: views, except for a step count of its
    own."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor
    """Float32 rows, or again those of the parameter where there is no master."""
    step: Tensor


class RoundedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` in float32 on parameters of 16 bits; what they hold is rounded from it.

    master: step a float32 copy, `state[parameter]["master"]`, and round it to nearest: the copy is
    bit for bit the weight of a float32 AdamW on the same gradients. It is made from the parameter
    in the first step, and from then on overwrites what anyone else puts into the parameter. The
    gradients of many micro-batches add up in float32, too (`parameter.grad_dtype`). Without a
    master, the parameter is stepped in float32 and rounded stochastically; the noise follows from
    `seed` and the step counts, so that it needs no state of its own.

    Parameters of 32 and 64 bits beside them are stepped as they are. A gradient that is NaN or inf
    makes its own weight NaN, as in torch; the loop throws such a step away before.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        master: bool,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        seed: int = 0,
    ) -> None:
        super().__init__(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
        self.master = master
        self.seed = seed
        for group in self.param_groups:
            for parameter in group["params"]:
                if not master and parameter.dtype == torch.float16:
                    raise InputError(
                        "stochastic rounding of float16 parameters is not available: expected "
                        "bfloat16 or float32, or set update_precision master"
                    )
                if master and _is_short(parameter):
                    # The dtype cannot change under a gradient that is there.
                    grad, parameter.grad = parameter.grad, None
                    parameter.grad_dtype = torch.float32
                    parameter.grad = None if grad is None else grad.float()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        generator = functools.cache(functools.partial(self._generator, self._noise_seed()))
        for group in self.param_groups:
            for chunk in _chunks(self._pieces(group["params"])):
                self._step_chunk(chunk, group, generator)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Float32 state stays float32; raises CheckpointError for a state of another precision."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        saved = state_dict["state"]
        # Where the lengths differ, torch says so below.
        pairs = [pair for pair in zip(numbers, parameters, strict=False) if pair[0] in saved]
        for number, parameter in pairs:
            self._check_state(number, saved[number], parameter)
        super().load_state_dict(state_dict)
        # torch has just rounded all but the step count to the parameter's 16 bits.
        for number, parameter in pairs:
            self.state[parameter] = {
                name: value.to("cpu" if name == "step" else parameter.device, copy=True)
                for name, value in saved[number].items()
            }

    def _check_state(self, number: int, state: dict[str, Tensor], parameter: Tensor) -> None:
        has_master = self.master and _is_short(parameter)
        moments = state["exp_avg"].dtype
        if ("master" in state, moments) != (has_master, _stepped_in(parameter)):
            raise CheckpointError(
                f"the optimizer state of parameter {number} holds {', '.join(state)}, its moments "
                f"in {moments}; expected {_stepped_in(parameter)} "
                f"{'with' if has_master else 'without'} master: make the optimizer with the "
                "update_precision that the state was saved with"
            )

    def _pieces(self, parameters: list[Tensor]) -> Iterator[Piece]:
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self._state(parameter)
            master = state.get("master", parameter)
            whole = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], master)
            rows = max(1, CHUNK * len(torch.atleast_1d(parameter)) // max(1, parameter.numel()))
            for views in zip(*(torch.atleast_1d(x).split(rows) for x in whole), strict=True):
                yield Piece(*views, state["step"].clone())
            state["step"] += 1

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=_stepped_in(parameter))
            if self.master and _is_short(parameter):
                state["master"] = parameter.float()
        return state

    def _step_chunk(
        self,
        pieces: list[Piece],
        group: dict[str, Any],
        generator: Callable[[torch.device], torch.Generator],
    ) -> None:
        # Without a master this is a copy, rounded back below.
        weights = [piece.master.to(piece.exp_avg.dtype) for piece in pieces]
        adamw(
            weights,
            [piece.gradient.to(piece.exp_avg.dtype) for piece in pieces],
            [piece.exp_avg for piece in pieces],
            [piece.exp_avg_sq for piece in pieces],
            [],
            [piece.step for piece in pieces],
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )
        for piece, weight in zip(pieces, weights, strict=True):
            if not _is_short(piece.parameter):
                continue
            if not self.master:
                noise = torch.empty_like(weight, dtype=torch.int32)
                noise.random_(0, 2**16, generator=generator(weight.device))
                weight = round_stochastically(weight, noise)
            piece.parameter.copy_(weight)

    def _noise_seed(self) -> int:
        """Another one for every step, from (seed, steps taken) alone."""
        taken = sum(int(state["step"]) for state in self.state.values())
        return random.Random(f"rounding/{self.seed}/{taken}").getrandbits(63)

    @staticmethod
    def _generator(seed: int, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)


def _is_short(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _stepped_in(parameter: Tensor) -> torch.dtype:
    return torch.float32 if _is_short(parameter) else parameter.dtype


def _chunks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces, together CHUNK numbers at most or one piece alone."""
    chunk: list[Piece] = []
    count = 0
    for piece in pieces:
        if chunk and count + piece.parameter.numel() > CHUNK:
            yield chunk
            chunk, count = [], 0
        chunk.append(piece)
        count += piece.parameter.numel()
    if chunk:
        yield chunk


def _torchao_adamw() -> Callable[..., torch.optim.Optimizer]:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optimizer = 'adamw_8bit' needs torchao ({error}): pip install torchao, or choose "
            "adamw"
        ) from error
    return AdamW8bit


def _adamw_8bit(parameters: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    optimizer = _torchao_adamw()(parameters, **options)
    optimizer.register_step_pre_hook(_rates_to_tensors)
    return optimizer


def _rates_to_tensors(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """torchao compiles its step for a rate that is a tensor; a schedule sets a number."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
