"""Options: what is refused and in which words, and how a file becomes a config."""

import dataclasses
import inspect
import math

import pytest

from grpo_fast.config import LossConfig, TrainConfig
from grpo_fast.config_file import TRL_NAMES, build_config, read_config
from grpo_fast.errors import ConfigError

NEEDED = {"model": "m", "dataset": "d.jsonl", "reward": ("r.py:f",)}


def write(folder, text: str):
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("cls", [LossConfig, TrainConfig])
def test_every_field_has_a_docstring(cls):
    lines = [line.strip() for line in inspect.getsource(cls).splitlines()]
    for field in dataclasses.fields(cls):
        at = next(k for k, line in enumerate(lines) if line.startswith(f"{field.name}: "))
        assert lines[at + 1].startswith('"""'), field.name


def test_configs_are_frozen_and_keyword_only():
    config = TrainConfig(**NEEDED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3
    with pytest.raises(TypeError):
        LossConfig("grpo")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "gpro"}, "loss_type = 'gpro' is not available: did you mean 'grpo'?"),
        ({"loss_type": "x"}, "choose one of grpo, bnpo, dapo, dr_grpo"),
        ({"importance_sampling_level": "batch"}, "choose one of token, sequence"),
        ({"kl_estimator": "k4"}, "choose one of k1, k2, k3"),
        ({"epsilon": 1.0}, "epsilon = 1.0 is out of range: expected 0 <= epsilon < 1"),
        ({"epsilon": -0.1}, "epsilon = -0.1"),
        ({"epsilon": math.nan}, "epsilon = nan"),
        ({"epsilon_high": -0.1}, "epsilon_high = -0.1"),
        ({"epsilon_high": math.inf}, "epsilon_high = inf"),
        ({"delta": 1.2}, "delta = 1.2 is out of range: expected more than 1 + epsilon_high = 1.2"),
        ({"delta": 1.25, "epsilon_high": 0.3}, "epsilon_high = 1.3"),
        ({"beta": -0.01}, "beta = -0.01"),
        ({"beta": math.nan}, "beta = nan"),
        ({"temperature": 0}, "temperature = 0 is out of range: expected a finite number > 0"),
        ({"max_completion_length": 0}, "max_completion_length = 0"),
        ({"log_ratio_clamp": 0}, "log_ratio_clamp = 0"),
        ({"log_ratio_clamp": 81}, "exp overflows float32 at 88"),
    ],
    ids=str,
)
def test_a_loss_option_out_of_range_is_named(options, words):
    with pytest.raises(ConfigError) as error:
        LossConfig(**options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_loss_options_at_their_limits_are_taken():
    LossConfig(epsilon=0, delta=1.01, log_ratio_clamp=80, beta=0, epsilon_high=0)
    assert LossConfig(epsilon=0.1).clip_high == 0.1
    assert LossConfig(epsilon=0.1, epsilon_high=0).clip_high == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": ""}, "model = ''"),
        ({"dataset": ""}, "dataset = ''"),
        ({"output_dir": ""}, "output_dir = ''"),
        ({"reward": ()}, "reward = ()"),
        ({"reward_weights": (1.0, 2.0)}, "2 values for 1 reward functions: give one each"),
        ({"reward_weights": (math.nan,)}, "reward_weights = [nan]"),
        ({"reward_weights": (0.0,)}, "at least one not 0"),
        ({"group_size": 1}, "group_size = 1 is out of range: expected at least 2: an advantage"),
        ({"temperature": 0.0}, "temperature = 0.0 is out of range: expected > 0"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.01}, "top_p = 1.01"),
        ({"top_p": math.nan}, "top_p = nan"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm = nan"),
        ({"adam_beta1": 1.0}, "adam_beta1 = 1.0"),
        ({"adam_beta2": -0.1}, "adam_beta2 = -0.1"),
        ({"seed": -1}, "seed = -1"),
        ({"eval_every": -1}, "eval_every = -1"),
        ({"impl": "tritan"}, "impl = 'tritan' is not available: did you mean 'triton'?"),
        ({"existing": "overwrite"}, "choose one of refuse, move"),
        ({"scale_rewards": "std"}, "choose one of group, batch, none, mean, nonzero"),
        ({"baseline": "median"}, "choose one of mean, leave_one_out, pass_at_k"),
        (
            {"multi_objective_aggregation": "normalise_then_sum"},
            "did you mean 'normalize_then_sum'?",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
            "found scale_rewards = 'none' and baseline = 'mean': leave both out",
        ),
        (
            {"scale_rewards": "mean", "baseline": "leave_one_out"},
            "scale_rewards = 'mean' (MaxRL) divides by the mean it subtracts, found baseline",
        ),
        (
            {"scale_rewards": "nonzero", "baseline": "pass_at_k"},
            "choose scale_rewards group, batch or none",
        ),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'?"),
        ({"dtype": "float16"}, "choose one of auto, float32, bfloat16"),
        ({"optimizer": "adam8bit"}, "choose one of adamw, adamw_8bit"),
        ({"update_precision": "nearest"}, "choose one of master, stochastic, none"),
        (
            {"update_precision": "stochastic"},
            "update_precision = 'stochastic' has no effect on the float32 parameters of dtype = "
            "'auto': leave it out, or set dtype bfloat16",
        ),
        ({"update_precision": "none", "dtype": "float32"}, "dtype = 'float32': leave it out"),
        (
            {"optimizer": "adamw_8bit", "dtype": "bfloat16"},
            "has no master copies of bfloat16 parameters, found update_precision = 'master': set",
        ),
        ({"checkpointing": "layers"}, "choose one of auto, on, off, offload"),
        ({"loss": LossConfig(temperature=0.5)}, "loss.temperature = 0.5 contradicts temperature"),
        ({"loss": LossConfig(max_completion_length=9)}, "contradicts max_completion_length"),
        *(
            ({name: 0}, f"{name} = 0 is out of range: expected at least 1")
            for name in (
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
        ),
    ],
    ids=str,
)
def test_a_run_option_out_of_range_is_named(options, words):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**(NEEDED | options))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_precisions_that_go_together_are_taken():
    for precision in ("master", "stochastic", "none"):
        TrainConfig(**NEEDED, dtype="bfloat16", update_precision=precision)
    for precision in ("stochastic", "none"):
        options = {"dtype": "bfloat16", "update_precision": precision}
        TrainConfig(**NEEDED, optimizer="adamw_8bit", **options)
    TrainConfig(**NEEDED, optimizer="adamw_8bit")


def test_one_reward_may_be_a_plain_string():
    assert TrainConfig(model="m", dataset="d", reward="r.py:f").reward == ("r.py:f",)


def test_the_loss_as_trained_has_the_sampling_temperature_and_length():
    config = TrainConfig(
        **NEEDED,
        temperature=0.7,
        max_completion_length=32,
        loss=LossConfig(loss_type="dr_grpo", beta=0.1),
    )
    assert config.step_loss == LossConfig(
        loss_type="dr_grpo", beta=0.1, temperature=0.7, max_completion_length=32
    )


def test_a_file_is_read_with_types_and_without_defaults(tmp_path):
    text = (
        "model: m\n"
        "dataset: d.jsonl\n"
        "reward: r.py:f\n"
        "reward_weights: 2\n"
        "learning-rate: 1e-5\n"
        "temperature: 1\n"
        "resume: true\n"
        "eval_dataset:\n"
        "loss:\n  epsilon-high: 0.28\n  delta: null\n"
    )
    values = read_config(write(tmp_path, text))
    assert values == {
        "model": "m",
        "dataset": "d.jsonl",
        "reward": ("r.py:f",),
        "reward_weights": (2.0,),
        "learning_rate": 1e-5,
        "temperature": 1.0,
        "resume": True,
        "eval_dataset": None,
        "loss": {"epsilon_high": 0.28, "delta": None},
    }
    assert type(values["temperature"]) is float
    config = build_config(values)
    assert config.loss == LossConfig(epsilon_high=0.28)
    assert config.group_size == TrainConfig(**NEEDED).group_size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: m", "unknown key 'modle': did you mean 'model'? known keys are adam_beta1, "),
        ("beta: 1", "unknown key 'beta': it belongs in the block under 'loss:'; known keys"),
        ("num_generations: 4", "unknown key 'num_generations': did you mean 'group_size'?"),
        ("loss:\n  betta: 1", "loss: unknown key 'betta': did you mean 'beta'?"),
        ("group_size: four", "group_size = 'four' is str, expected int"),
        ("group_size: 4.5", "group_size = 4.5 is float, expected int"),
        ("group_size: true", "group_size = True is bool, expected int"),
        ("seed:", "seed = None is NoneType, expected int"),
        ("temperature: hot", "temperature = 'hot' is str, expected float"),
        ("temperature: false", "temperature = False is bool, expected float"),
        ("resume: 1", "resume = 1 is int, expected bool"),
        ("model: 7", "model = 7 is int, expected text"),
        ("impl: 7", "impl = 7 is int, expected text"),
        ("reward: [a:f, 3]", "reward = 3 is int, expected text"),
        ("reward_weights: [1, x]", "reward_weights = 'x' is str, expected float"),
        ("loss: grpo", "loss = 'grpo', expected a block of `option: value` lines"),
        ("- model", "holds list, expected `key: value` lines"),
        ("", "holds NoneType, expected `key: value` lines"),
        ("model: [", "is not YAML: "),
        ("model: !!python/object:os.system x", "is not YAML: "),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        read_config(path)
    assert str(path) in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_a_folder_and_bytes_that_are_no_text(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml does not exist"):
        read_config(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "latin.yaml")


def test_an_input_beside_the_file_is_meant_relative_to_it(tmp_path):
    for name in ("d.jsonl", "r.py"):
        (tmp_path / name).touch()
    (tmp_path / "weights").mkdir()
    absolute = str(tmp_path / "elsewhere" / "e.jsonl")
    text = (
        "model: weights\n"
        "dataset: d.jsonl\n"
        f"eval_dataset: {absolute}\n"
        "reward: [r.py:f, package.module:g]\n"
        "output_dir: weights\n"
    )
    values = read_config(write(tmp_path, text))
    assert values == {
        "model": str(tmp_path / "weights"),
        "dataset": str(tmp_path / "d.jsonl"),
        "eval_dataset": absolute,
        "reward": (str(tmp_path / "r.py") + ":f", "package.module:g"),
        "output_dir": "weights",
    }


def test_an_empty_name_in_a_file_is_refused_not_read_as_the_folder(tmp_path):
    values = read_config(write(tmp_path, "model: ''\ndataset: d\nreward: r:f\n"))
    with pytest.raises(ConfigError, match="model = ''"):
        build_config(values)


def test_what_is_missing_is_listed():
    with pytest.raises(ConfigError, match=r"^dataset, reward not given.*--dataset"):
        build_config({"model": "m"})


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "group-size: 4\ngroup_size: 8\n"])
def test_a_key_given_twice_is_refused(tmp_path, text):
    key = text.partition(":")[0].replace("-", "_")
    with pytest.raises(ConfigError, match=f"key '{key}' is given twice"):
        read_config(write(tmp_path, text))


def test_names_of_trl_point_at_options_and_are_none():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(TRL_NAMES.values()) <= fields
    assert not set(TRL_NAMES) & fields
