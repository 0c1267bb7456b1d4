"""What the tests of TRL's trainers share: tiny trainings, and when two of them are the same."""

import math
import types

import pytest
import torch

# Puts the hosts onto the path.
from grpo_bench.hosts import PEERS  # noqa: F401
from grpo_fast.tiny import tiny_tokenizer

MARKS = [
    pytest.mark.host,
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
# float32 rounding, through a few steps of the optimizer.
RELATIVE, ABSOLUTE = 2e-5, 2e-6
WEIGHTS = {"rtol": 1e-3, "atol": 1e-4}
CLOCKS = ("_time", "_runtime", "_per_second")
PROMPTS = {"prompt": ["ab", "abcdefgh", "12", "x"] * 4}
TWO_ITERATIONS = {"num_iterations": 2, "steps_per_generation": 1, "max_steps": 4}


def answer(completion_ids, **columns):
    """Of token ids, and the same for all of a group now and then."""
    return [float(sum(i % 3 for i in ids) // 4) for ids in completion_ids]


def short(completion_ids, **columns):
    """Does not apply to some."""
    return [None if ids[0] % 3 == 0 else 1.0 / len(ids) for ids in completion_ids]


def release() -> tuple[int, int]:
    """Of the TRL that is first on the path; tests/integrations/test_trl_releases.py has others."""
    import trl

    return tuple(int(part) for part in trl.__version__.split(".")[:2])


def host_class():
    from trl import GRPOTrainer

    return GRPOTrainer


def drop_in():
    from grpo_fast.integrations.trl import GRPOTrainer

    return GRPOTrainer


def rollout(prompts, trainer):
    """Completions of some length with words of an environment in them, and what the sampler said
    of each token; one that it did not score."""
    source = torch.Generator().manual_seed(trainer.state.global_step)
    encoded = trainer.processing_class(prompts)["input_ids"]
    completions, masks, logprobs = [], [], []
    for k, _ in enumerate(prompts):
        length = int(torch.randint(2, 9, (1,), generator=source))
        completions.append(torch.randint(3, 40, (length,), generator=source).tolist())
        masks.append([int(t != 1 and k != 3) for t in range(length)])
        noise = 0.2 * torch.randn(length, generator=source)
        logprobs.append((noise - 3.9).tolist())
    # Up to 1.10 TRL's loss is NaN where a token was not scored.
    if release() > (1, 10):
        logprobs[0][0] = math.nan
    return {
        "prompt_ids": encoded,
        "completion_ids": completions,
        "logprobs": logprobs,
        "env_mask": masks,
    }


def with_sampler(**options):
    """The trainer believes in vLLM from here on, whose log-probs the rollout hands over."""

    def adjust(trainer):
        trainer.use_vllm = trainer.args.use_vllm = True
        trainer._last_loaded_step = trainer.state.global_step
        trainer.vllm_generation = types.SimpleNamespace(sync_weights=lambda: None)
        for name, value in options.items():
            setattr(trainer, name, value)
            setattr(trainer.args, name, value)
        if hasattr(trainer, "_decide"):
            trainer._taken = trainer._decide()

    return adjust


def options_of(folder, **options):
    """Of a config of any trainer of TRL's: three steps in float32 on a CPU."""
    return {
        "output_dir": str(folder / "unused"),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "seed": 1,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }


def config_of(folder, **options):
    from trl import GRPOConfig

    sizes = {"num_generations": 4, "max_completion_length": 8, "per_device_train_batch_size": 8}
    return GRPOConfig(**options_of(folder, **sizes | options))


def trainer_of(
    kind, folder, *, reward=answer, peft_config=None, rollout_func=None, adjust=None, **options
):
    """A trainer of the class `kind` on the model in `folder`; options are those of GRPOConfig."""
    from datasets import Dataset

    # Adapters begin at random, and before 1.10 TRL did not seed them.
    torch.manual_seed(1)
    prompts = Dataset.from_dict(PROMPTS)
    trainer = kind(
        str(folder),
        reward,
        config_of(folder, **options),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        **({} if rollout_func is None else {"rollout_func": rollout_func}),
    )
    if adjust is not None:
        adjust(trainer)
    return trainer


def trained(kind, folder, *, resume=None, **options):
    trainer = trainer_of(kind, folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def recorded(model, run, kind=None, *, reward=(answer, short), more=None, adjust=None, **options):
    """`trained` with a RunLogCallback that writes the folder `run`; `more` are its options."""
    from grpo_fast.integrations.trl_callback import RunLogCallback

    def listened(trainer):
        trainer.add_callback(RunLogCallback(run, trainer, **(more or {})))
        if adjust is not None:
            adjust(trainer)

    options = {
        "output_dir": str(run.parent / "trl"),
        "per_device_eval_batch_size": 4,
        "beta": 0.04,
        "reward_weights": [1.0, 0.5][: len(reward)],
        **options,
    }
    kind = kind or host_class()
    return trained(kind, model, reward=list(reward), adjust=listened, **options)


def assert_same_logs(theirs, ours, *, exact=False):
    """Metric by metric; clocks go their own way."""
    assert len(theirs) == len(ours)
    for expected, found in zip(theirs, ours, strict=True):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            same = name.endswith(CLOCKS) or value == found[name]
            if not same and not exact:
                same = math.isclose(found[name], value, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
            assert same, f"step {expected['step']}: {name} {found[name]}, TRL has {value}"


def assert_same(theirs, ours):
    """Trainers: whole logs, metric by metric, and the weights at the end."""
    assert_same_logs(theirs.state.log_history, ours.state.log_history)
    weights = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], **WEIGHTS)


def assert_same_training(folder, *, depth="packed", **options):
    """With TRL's trainer and with the drop-in, which goes this deep."""
    theirs, ours = (trained(kind, folder, **options) for kind in (host_class(), drop_in()))
    assert ours._taken == depth
    assert_same(theirs, ours)
    return theirs, ours
