"""What the log of tokens costs TRL's trainer: `.venv/bin/python docs/trl_log_cost.py`, one thread,
about four minutes.

TRL trains as it does, on random completions of full length in place of sampling; what
`RunLogCallback(log_tokens_mb=...)` adds to a step is timed where it is added, every second step is
kept. Columns as in log_cost.py; `rest` is what else it does: metrics, completions, doctor.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from log_cost import WIDE, print_row
from transformers import PrinterCallback, TrainerCallback

# Puts TRL onto the path.
from grpo_bench.hosts import PEERS  # noqa: F401
from grpo_fast.integrations.trl import GRPOTrainer as Ours
from grpo_fast.integrations.trl_callback import RunLogCallback
from grpo_fast.integrations.trl_tokens import StepWatch
from grpo_fast.tiny import save_tiny, tiny_tokenizer
from grpo_fast.token_log import TokenLog

# (name, what of the tiny model is changed, completions of a step, of a micro-batch, their tokens,
# steps)
CASES = (
    ("25k parameters, 8 completions of 8 tokens", {}, 8, 8, 8, 40),
    ("4 layers x 128, 64 completions", WIDE, 64, 16, 128, 12),
    ("4 layers x 128, 256 completions", WIDE, 256, 32, 128, 10),
)
DEPTHS = ("TRL", "packed", "fused")
GROUP = 8
PROMPTS = {"prompt": ["12+34=", "ab", "abcdefgh", "x"] * 16}
ADDED = {
    StepWatch: ("_generate", "_logprobs", "_compute", "begin_step", "end_step"),
    Ours: ("_told",),
    RunLogCallback: ("on_log", "on_step_begin", "on_step_end"),
    TokenLog: ("_put",),
}


class Step(NamedTuple):
    """Milliseconds of processor time."""

    kept: bool
    update: float
    here: float
    worker: float
    rest: float


class Meter:
    """Times the methods of `ADDED`, but for what they call of the trainer's or of each other."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(ADDED, 0.0)
        self._inside = 0.0

    def __enter__(self) -> "Meter":
        self._before = [(kind, name, getattr(kind, name)) for kind in ADDED for name in ADDED[kind]]
        for kind, name, method in self._before:
            setattr(kind, name, self._timed(kind, method))
        self._due, TokenLog.due = TokenLog.due, every_second
        return self

    def __exit__(self, *_) -> None:
        for kind, name, method in self._before:
            setattr(kind, name, method)
        TokenLog.due = self._due

    def _timed(self, kind: type, method: Callable) -> Callable:
        if kind is TokenLog:

            def put(*args):
                begin = time.thread_time()
                found = method(*args)
                self.spent[kind] += time.thread_time() - begin
                return found

            return put

        def timed(watch, *args, **more):
            before, self._inside, begin = self._inside, 0.0, time.thread_time()
            if kind is StepWatch and args and callable(args[0]):
                args = (self._theirs(args[0]), *args[1:])
            found = method(watch, *args, **more)
            whole = time.thread_time() - begin
            self.spent[kind] += whole - self._inside
            self._inside = before + whole
            return found

        return timed

    def _theirs(self, call: Callable) -> Callable:
        def timed(*args, **more):
            before, self._inside, begin = self._inside, 0.0, time.thread_time()
            found = call(*args, **more)
            self._inside = before + time.thread_time() - begin
            return found

        return timed

    def taken(self) -> dict[type, float]:
        found, self.spent = self.spent, dict.fromkeys(ADDED, 0.0)
        return {kind: 1e3 * seconds for kind, seconds in found.items()}


class EachStep(TrainerCallback):
    """Added last, so that a step ends after the log of it, which is waited for here."""

    def __init__(self, meter: Meter, callback: RunLogCallback, found: list[Step]) -> None:
        self._meter, self._callback, self._found = meter, callback, found
        self._since: float | None = None

    def on_step_end(self, args, state, control, **kwargs):
        self._callback._run.tokens.flush()
        now, taken = 1e3 * time.process_time(), self._meter.taken()
        if self._since is not None:
            *here, rest, worker = taken.values()
            update = now - self._since - sum(taken.values())
            self._found.append(Step(state.global_step % 2 == 0, update, sum(here), worker, rest))
        self._since = now


def rollout_of(length: int) -> Callable:
    """Random completions of `length` tokens."""

    def rollout(prompts, trainer):
        source = torch.Generator().manual_seed(trainer.state.global_step)
        count = len(prompts)
        return {
            "prompt_ids": trainer.processing_class(prompts)["input_ids"],
            "completion_ids": torch.randint(3, 50, (count, length), generator=source).tolist(),
            "logprobs": [[-3.9] * length] * count,
        }

    return rollout


def right(completion_ids, **columns):
    return [float(ids[0] % 2) for ids in completion_ids]


def trainer_of(depth: str, folder: Path, batch: int, micro: int, length: int, steps: int) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    kind = GRPOTrainer
    if depth != "TRL":
        kind = type("GRPOTrainer", (Ours,), {"depth": depth})
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        num_generations=GROUP,
        max_completion_length=length,
        max_steps=steps,
        beta=0.001,
        logging_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return kind(
        str(folder / "model"),
        right,
        config,
        train_dataset=Dataset.from_dict(PROMPTS),
        processing_class=tiny_tokenizer(),
        rollout_func=rollout_of(length),
    )


def measure(meter: Meter, depth: str, changes: dict, *sizes: int) -> list[Step]:
    found: list[Step] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        save_tiny(folder / "model", **changes)
        trainer = trainer_of(depth, folder, *sizes)
        trainer.remove_callback(PrinterCallback)
        callback = RunLogCallback(folder / "run", trainer, log_tokens_mb=1e6)
        trainer.add_callback(callback)
        trainer.add_callback(EachStep(meter, callback, found))
        trainer.train()
    return found[1:]


def cells(found: list[Step]) -> list[str]:
    """Medians; the shares are those of each step."""
    kept = [step for step in found if step.kept]
    less = [step for step in found if not step.kept]
    update = statistics.median(step.update for step in found)
    columns = (
        [step.here for step in kept],
        [step.here + step.worker for step in kept],
        [step.here for step in less],
        [step.rest for step in found],
    )
    times = [statistics.median(column) for column in columns]
    return [
        f"{update:,.0f}",
        *(f"{value:,.1f}" for value in times),
        *(f"{100 * value / update:.2f} %" for value in times),
    ]


def every_second(log: TokenLog, step: int) -> bool:
    log.flush()
    return step % 2 == 0


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    names = ("here", "all", "not kept", "rest")
    print_row("model", "tokens", "loss", "step ms", *(f"{name} ms" for name in names), *names)
    print_row(*["---"] * 12)
    with Meter() as meter:
        for name, changes, batch, micro, length, steps in CASES:
            for depth in DEPTHS:
                found = measure(meter, depth, changes, batch, micro, length, steps)
                print_row(name, f"{batch * length:,}", depth, *cells(found))


if __name__ == "__main__":
    main()
