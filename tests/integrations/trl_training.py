"""What the tests of TRL's trainers share: tiny trainings, and when two of them are the same."""

import math
import types

import torch

# Puts the hosts onto the path.
from grpo_bench.hosts import PEERS  # noqa: F401
from grpo_fast.tiny import tiny_tokenizer

# float32 rounding, through a few steps of the optimizer.
RELATIVE, ABSOLUTE = 2e-5, 2e-6
CLOCKS = ("_time", "_runtime", "_per_second")
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


def config_of(folder, **options):
    """A GRPOConfig of three steps in float32 on a CPU."""
    from trl import GRPOConfig

    options = {
        "output_dir": str(folder / "unused"),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
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
    return GRPOConfig(**options)


def trainer_of(
    kind, folder, *, reward=answer, peft_config=None, rollout_func=None, adjust=None, **options
):
    """A trainer of the class `kind` on the model in `folder`; options are those of GRPOConfig."""
    from datasets import Dataset

    # Adapters begin at random, and before 1.10 TRL did not seed them.
    torch.manual_seed(1)
    prompts = Dataset.from_dict({"prompt": ["ab", "abcdefgh", "12", "x"] * 4})
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


def assert_same_weights(theirs, ours):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
