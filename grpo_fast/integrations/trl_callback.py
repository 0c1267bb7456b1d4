"""TRL's trainer writes our run log: metrics, completions, the doctor's notes, and a report.

trainer = GRPOTrainer(...)  # TRL's own, or grpo_fast.integrations.trl
trainer.add_callback(RunLogCallback("runs/x", trainer))
"""

import dataclasses
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..doctor import Doctor
from ..errors import ConfigError, GrpoFastError
from ..import_lines import measured, read_completions, text_of
from ..loss_config import LossConfig
from ..report import write_report
from ..runlog import RunLog, open_run, read_metrics, write_config
from .trl_tokens import StepWatch, step_tokens

# Keys of config.json that TRL has under the same name.
SAME = (
    "num_iterations",
    "learning_rate",
    "max_completion_length",
    "temperature",
    "top_p",
    "scale_rewards",
    "max_grad_norm",
    "warmup_steps",
    "weight_decay",
    "seed",
)

log = logging.getLogger("grpo_fast")


@dataclasses.dataclass(frozen=True)
class _Folder:
    """What `open_run` asks of a config."""

    output_dir: str
    max_steps: int
    resume: bool
    existing: str
    log_tokens_mb: float


class RunLogCallback(TrainerCallback):
    """A run folder as `grpo-fast train` writes it, for report, doctor and diff.

    transformers tells a callback neither completions nor rewards: `trainer` has them. A step's
    completions are up to `log_completions` of the latest generation, whole groups, those of the
    widest rewards first. log_tokens_mb: at most that many million bytes of steps token by token,
    for the group X-ray; 0 keeps none and leaves the trainer alone. existing: `refuse` a folder that
    holds a run, or `move` that aside; a training that is resumed goes on with it.
    """

    def __init__(
        self,
        folder: str | Path,
        trainer: Any,
        *,
        log_completions: int = 64,
        log_tokens_mb: float = 32.0,
        existing: str = "refuse",
    ) -> None:
        self.folder = Path(folder)
        self._trainer = trainer
        self._count = log_completions
        self._existing = existing
        if not 0 <= log_tokens_mb < math.inf:
            raise ConfigError(f"log_tokens_mb = {log_tokens_mb}, expected a number from 0 up")
        self._megabytes = log_tokens_mb
        self._run: RunLog | None = None
        self._tokens: StepWatch | None = None
        self._of_tokens: list[dict[str, float]] = []
        """Of the steps since the last row."""
        self._row: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        resumed = state.global_step > 0 and self.folder.joinpath("metrics.jsonl").is_file()
        told = (str(self.folder), state.max_steps, resumed, self._existing, self._megabytes)
        self._run = open_run(_Folder(*told))  # type: ignore
        if resumed:
            self._run.truncate_after(state.global_step)
        else:
            self._run.start()
        options = run_options(args, state)
        write_config(self.folder, options)
        self._doctor = Doctor(options)
        for row in read_metrics(self.folder):
            self._doctor.feed(row)
        if self._tokens is not None:
            # Of a training that ended with an error.
            self._tokens.detach()
        self._tokens = step_tokens(self._trainer, self._run.tokens)
        if self._tokens is not None:
            self._tokens.attach()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._run is None:
            return
        # Evaluation and the end of training log the same step once more.
        if self._row.get("step") != state.global_step:
            self._flush()
        training = any(not name.startswith(("eval_", "train_", "epoch")) for name in logs)
        if training and "completions" not in self._row:
            completions = latest_completions(self._trainer, state.global_step)
            # Of what TRL does not log, the latest generation is measured.
            self._row |= measured(completions)[0] if completions else {}
            self._run.log_completions(chosen(completions, self._count))
            self._row |= means(self._of_tokens)
            self._of_tokens = []
        self._row |= {**logs, "step": state.global_step}

    def on_step_begin(self, args, state, control, **kwargs):
        self._flush()
        if self._tokens is not None:
            self._tokens.begin_step()

    def on_step_end(self, args, state, control, **kwargs):
        if self._tokens is not None:
            self._of_tokens.append(self._tokens.end_step(state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        if self._run is None:
            return
        self._flush()
        if self._tokens is not None:
            self._tokens.detach()
            self._tokens = None
        self._run.close()
        self._run = None
        try:
            log.info("report: %s", write_report(self.folder))
        except GrpoFastError as error:
            # A training that is done is not lost for its page.
            log.warning("no report: %s", error)

    def _flush(self) -> None:
        """The row of a step that is over."""
        if self._run is None or not self._row:
            return
        row, self._row = self._row, {}
        step = row.pop("step")
        self._run.log(step, row)
        for finding in self._doctor.feed({"step": step, **row}):
            level = logging.INFO if finding.severity == "info" else logging.WARNING
            log.log(level, "%s", finding.line())


def run_options(args: Any, state: Any) -> dict[str, Any]:
    """config.json: our names where TRL has the same, and TRL's own options under `trl`."""
    try:
        loss = dataclasses.asdict(LossConfig.from_trl(args))
    except GrpoFastError:
        # TRL trains with what LossConfig refuses.
        loss = {name: getattr(args, name) for name in ("loss_type", "beta", "epsilon")}
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "group_size": args.num_generations,
        "prompts_per_step": batch / args.num_generations,
        "max_steps": state.max_steps,
        **{name: getattr(args, name) for name in SAME},
        "loss": loss,
        "trl": {name: value for name, value in args.to_dict().items() if value is not None},
    }


def latest_completions(trainer: Any, step: int) -> list[dict[str, Any]]:
    """The latest generation as rows of completions.jsonl."""
    logs = trainer._logs
    weights = dict(zip(logs["rewards"], trainer.reward_weights.tolist(), strict=False))
    lines = []
    for k, prompt in enumerate(logs["prompt"]):
        rewards = {name: values[k] for name, values in logs["rewards"].items()}
        scored = [weights[name] * x for name, x in rewards.items() if not math.isnan(x)]
        line = {
            "step": step,
            "prompt": text_of(prompt),
            "completion": text_of(logs["completion"][k]),
            "reward": sum(scored) if scored else None,
            "rewards": rewards,
            "advantage": logs["advantages"][k],
            "columns": {name: values[k] for name, values in logs["extra"].items()},
        }
        lines.append((f"completion {k} of step {step}", line))
    return read_completions(lines)[0]


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the steps that one row is of, as TRL averages its own metrics; counters are the latest."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        found[name] = values[-1] if name.startswith("tokens/") else statistics.fmean(values)
    return found


def chosen(completions: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """Whole groups, widest rewards first, up to `count` completions; the first one in any case."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in completions if count else ():
        kept = {name: value for name, value in row.items() if name != "length"}
        groups.setdefault(row["group"], []).append(kept)

    def width(group: Sequence[Mapping[str, Any]]) -> float:
        scores = [row["reward"] for row in group if row["reward"] is not None]
        return statistics.pstdev(scores) if scores else 0.0

    rows: list[dict[str, Any]] = []
    for group in sorted(groups.values(), key=width, reverse=True):
        if rows and len(rows) + len(group) > count:
            break
        rows += group
    return rows
