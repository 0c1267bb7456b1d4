"""Every option of a run: `TrainConfig`, a frozen dataclass, validated when constructed.

`LossConfig` is `loss_config.py`. A YAML file becomes a `TrainConfig` through `config_file.py`; the
command line is generated from the same fields.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from .advantage_config import Baseline, MultiReward, Scale, advantage_conflict
from .errors import ConfigError
from .loss_config import LossConfig, check, check_choice, is_number

Scheduler = Literal["constant", "linear", "cosine"]
Existing = Literal["refuse", "move"]
Dtype = Literal["auto", "float32", "bfloat16"]
Optimizer = Literal["adamw", "adamw_8bit"]
UpdatePrecision = Literal["master", "stochastic", "none"]
Track = Literal["trackio", "tensorboard", "wandb"]
Impl = Literal["auto", "triton", "torch", "reference"]
Sharing = Literal["auto", "on", "off"]
Chunking = Literal["auto", "on", "off"]
Checkpointing = Literal["auto", "on", "off", "offload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run. `prompts_per_step` x `group_size` completions make one optimizer step; how they are
    packed into rows of `token_budget` tokens does not change the result."""

    model: str
    """Hugging Face model directory, or `file.py:function` that makes one: function(directory,
    seed)."""
    dataset: str
    """JSONL file, one object a line: `prompt` (text or chat messages), other columns go to the
    reward."""
    reward: tuple[str, ...]
    """Reward functions as `file.py:function` or `package.module:function`; several are weighted and
    summed, before or after they are normalized (multi_objective_aggregation)."""
    reward_weights: tuple[float, ...] = ()
    """One weight a reward function; all 1 when not given."""
    eval_dataset: str | None = None
    """JSONL file of held-out prompts; the last `eval_prompts` rows of `dataset` are held out when
    not given."""
    eval_prompts: int = 64
    """Held-out prompts per evaluation, answered greedily."""
    output_dir: str = "runs/grpo"
    """Where checkpoints, metrics, completions and the report go."""
    existing: Existing = "refuse"
    """When `output_dir` already holds a run: `refuse` to start, or `move` the old run aside and say
    where."""
    resume: bool = False
    """Go on from the newest intact checkpoint in `output_dir`."""

    prompts_per_step: int = 8
    """Prompts per optimizer step."""
    group_size: int = 8
    """Completions per prompt (TRL: num_generations)."""
    token_budget: int | None = None
    """Most tokens of one packed row; when not given 16384 (on a CPU 2048 behind the longest
    prompt), or what memory holds."""
    share_prompts: Sharing = "auto"
    """Forward a prompt once for its group: `auto` where that saves more than 15 % of the tokens,
    `on`, `off`."""
    chunking: Chunking = "auto"
    """A group above token_budget: `auto` forwards its prompt once and its completions row by row,
    `on` does so with every shared group, `off` forwards the prompt again in each row."""
    checkpointing: Checkpointing = "auto"
    """Compute layers again in the backward: `off`, `on`, `offload` (what enters a layer waits in
    CPU memory), or `auto`, the first of these that fits."""
    attention: str = "auto"
    """Who computes attention in a training step, of `grpo_fast.attention_choice`."""
    max_prompt_length: int = 1024
    """Longest prompt in tokens; a longer one is refused by row."""
    max_completion_length: int = 256
    """Most tokens sampled per completion."""
    temperature: float = 1.0
    """Sampling temperature, also of the loss."""
    top_p: float = 1.0
    """Nucleus sampling: keep the smallest set of tokens with this probability."""
    scale_rewards: Scale = "group"
    """Divide advantages by the group's std, the batch's, none (Dr. GRPO), or the group's `mean`
    (MaxRL); `nonzero` multiplies by scored / nonzero rewards of the step (GPG)."""
    baseline: Baseline = "mean"
    """Subtract the group's mean reward, or the mean of the other members (RLOO); `pass_at_k` gives
    the best its distance to the second and all others 0."""
    multi_objective_aggregation: MultiReward = "sum_then_normalize"
    """Several rewards: advantages of their weighted sum, or the weighted sum of each one's
    normalized rewards over its std in the step (GDPO)."""
    mask_truncated_completions: bool = False
    """Leave completions that hit max_completion_length out of the loss (DAPO overlong filter)."""

    optimizer: Optimizer = "adamw"
    """`adamw`, or `adamw_8bit`: moments in 8 bits, by torchao (pip install torchao)."""
    update_precision: UpdatePrecision = "master"
    """How small updates reach the parameters of dtype bfloat16: AdamW steps a float32 `master` copy
    (18 bytes a parameter with its gradient), or rounds `stochastic`ally (12, adamw_8bit 6); `none`
    rounds to nearest, and loses most of them (8, adamw_8bit 6). Float32 ones lose none."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Scheduler = "constant"
    """Course of the learning rate after warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    adam_beta1: float = 0.9
    """AdamW beta1."""
    adam_beta2: float = 0.999
    """AdamW beta2."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    max_steps: int = 200
    """Rollouts to train on."""
    num_iterations: int = 1
    """Optimizer steps per rollout; from the second on, old log-probs make the clip matter."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss."""

    eval_every: int = 20
    """Steps between evaluations; 0 evaluates before and after training only."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    log_every: int = 1
    """Steps between progress lines; metrics.jsonl has every step."""
    log_completions: int = 4
    """Completions kept per step in completions.jsonl: best, worst and others of one group."""
    track: tuple[str, ...] = ()
    """Trackers that see the run live, beside its folder: `trackio`, `tensorboard`, `wandb`."""
    log_tokens_mb: float = 32.0
    """Most MB of per-token numbers kept of a run, in tokens/; 0 keeps none."""
    seed: int = 0
    """Everything random in step k follows from (seed, k)."""
    dtype: Dtype = "auto"
    """Of the parameters; `auto` is float32, with products in bfloat16 on a GPU."""
    device: str = "auto"
    """`cuda`, `cpu`, or `auto`: a GPU if there is one."""
    impl: Impl = "auto"
    """Who computes the loss: `triton` kernels, `torch` in chunks, eager `reference`; `auto` is
    triton on a GPU."""

    def __post_init__(self) -> None:
        for name in ("model", "dataset", "output_dir"):
            check(bool(getattr(self, name)), name, getattr(self, name), "a path")
        if isinstance(self.reward, str):
            object.__setattr__(self, "reward", (self.reward,))
        check(len(self.reward) > 0, "reward", self.reward, "at least one `file.py:function`")
        self._check_rewards()
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in self.track:
            check_choice("track", name, Track)
        self._check_optimizer()
        names = ("scale_rewards", "baseline", "multi_objective_aggregation")
        conflict = advantage_conflict(**{name: getattr(self, name) for name in names})
        if conflict is not None:
            raise ConfigError(conflict)
        for name in _POSITIVE:
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "at least 1")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            check(is_number(value) and value >= 0, name, value, ">= 0")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            check(is_number(value) and value > 0, name, value, "> 0")
        for name in ("adam_beta1", "adam_beta2"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 <= beta < 1")
        check(
            self.group_size >= 2,
            "group_size",
            self.group_size,
            "at least 2",
            ": an advantage compares a completion with the others of its group, and one alone "
            "teaches nothing",
        )
        check(
            is_number(self.temperature) and self.temperature > 0,
            "temperature",
            self.temperature,
            "> 0",
            ": at temperature 0 all completions of a group are the same (evaluation is greedy "
            "anyway)",
        )
        check(0 < self.top_p <= 1, "top_p", self.top_p, "0 < top_p <= 1")
        if self.loss.temperature not in (1.0, self.temperature):
            raise ConfigError(
                f"loss.temperature = {self.loss.temperature} contradicts temperature = "
                f"{self.temperature}: the loss must use the sampling temperature, leave it out"
            )
        if self.loss.max_completion_length not in (None, self.max_completion_length):
            raise ConfigError(
                f"loss.max_completion_length = {self.loss.max_completion_length} contradicts "
                f"max_completion_length = {self.max_completion_length}: leave it out"
            )

    def _check_rewards(self) -> None:
        weights = self.reward_weights
        if weights and len(weights) != len(self.reward):
            raise ConfigError(
                f"reward_weights has {len(weights)} values for {len(self.reward)} reward "
                "functions: give one each"
            )
        if not all(is_number(weight) for weight in weights) or (weights and not any(weights)):
            raise ConfigError(
                f"reward_weights = {list(weights)}: expected finite numbers, at least one not 0"
            )

    def _check_optimizer(self) -> None:
        found = f"update_precision = '{self.update_precision}'"
        if self.dtype != "bfloat16" and self.update_precision != "master":
            raise ConfigError(
                f"{found} has no effect on the float32 parameters of dtype = '{self.dtype}': leave "
                "it out, or set dtype bfloat16"
            )
        # What is left of master is that of bfloat16 parameters: float32 ones are their own.
        if self.dtype == "bfloat16" and (self.optimizer, self.update_precision) == (
            "adamw_8bit",
            "master",
        ):
            raise ConfigError(
                f"optimizer = 'adamw_8bit' has no master copies of bfloat16 parameters, found "
                f"{found}: set update_precision stochastic, or none"
            )

    @property
    def step_loss(self) -> LossConfig:
        """The loss as trained: sampling temperature and completion length filled in."""
        return dataclasses.replace(
            self.loss,
            temperature=self.temperature,
            max_completion_length=self.max_completion_length,
        )


_CHOICES = {
    "existing": Existing,
    "scale_rewards": Scale,
    "baseline": Baseline,
    "multi_objective_aggregation": MultiReward,
    "lr_scheduler_type": Scheduler,
    "optimizer": Optimizer,
    "update_precision": UpdatePrecision,
    "dtype": Dtype,
    "impl": Impl,
    "share_prompts": Sharing,
    "chunking": Chunking,
    "checkpointing": Checkpointing,
}
_NOT_NEGATIVE = (
    "eval_every",
    "save_every",
    "warmup_steps",
    "weight_decay",
    "log_completions",
    "log_tokens_mb",
    "seed",
)
_POSITIVE = (
    "eval_prompts",
    "prompts_per_step",
    "token_budget",
    "max_prompt_length",
    "max_completion_length",
    "max_steps",
    "num_iterations",
    "keep_checkpoints",
    "log_every",
)
