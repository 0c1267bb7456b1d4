"""How the drop-in makes an optimizer step: packed as one, and whole or not at all."""

import pytest
from trl_training import (
    MARKS,
    TWO_ITERATIONS,
    assert_same_training,
    drop_in,
    host_class,
    trained,
    trainer_of,
)

from grpo_fast.errors import InputError

pytestmark = MARKS


def test_after_an_error_in_a_micro_batch_no_gradient_is_left(model, monkeypatch):
    from grpo_fast import step

    row_loss, rows = step._row_loss, []

    def failing(*arguments):
        rows.append(arguments)
        if len(rows) == 4:
            raise RuntimeError("out of memory")
        return row_loss(*arguments)

    monkeypatch.setattr(step, "_row_loss", failing)
    monkeypatch.setattr(step, "group_budget", lambda groups, device: 40)
    trainer = trainer_of(drop_in(), model, gradient_accumulation_steps=4)
    with pytest.raises(RuntimeError, match="out of memory") as error:
        trainer.train()
    assert error.value.__notes__ == [
        "grpo-fast dropped all gradients of this optimizer step: begin it again"
    ]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("depth", ["packed", "fused", "kernel", "own"])
def test_the_profiler_sees_the_passes_that_it_sees_in_trl(model, monkeypatch, depth):
    from trl.extras.profiling import ProfilingContext

    names: list[str] = []
    monkeypatch.setattr(drop_in(), "depth", depth)
    monkeypatch.setattr(ProfilingContext, "_log_metrics", lambda self, _: names.append(self.name))
    passes = []
    for kind in (host_class(), drop_in()):
        names.clear()
        trained(kind, model, beta=0.04, **TWO_ITERATIONS)
        passes.append(sorted(names))
    assert passes[0] == passes[1]
    assert "GRPOTrainer._get_per_token_logps_and_entropies" in passes[0]


def test_prompts_are_forwarded_once(model, monkeypatch):
    """Otherwise all of the above could be TRL's own code."""
    import grpo_fast.integrations.trl as integration

    seen = []

    def spied(model, groups, **options):
        seen.append(groups)
        return original(model, groups, **options)

    original = integration.grpo_backward
    monkeypatch.setattr(integration, "grpo_backward", spied)
    trained(drop_in(), model, max_steps=1)
    ((first, second),) = seen
    assert [len(first.completion_ids), len(second.completion_ids)] == [4, 4]


@pytest.mark.parametrize(
    "options, calls",
    [
        ({"loss_type": "dapo"}, [[4, 4]] * 2),
        ({"loss_type": "dapo", "num_iterations": 2}, [[4, 4]] * 2),
        # Two optimizer steps a generation: a group is whole only by chance.
        ({"loss_type": "grpo", "steps_per_generation": 4}, [8] * 2),
        # The means of a micro-batch are nobody else's.
        ({"loss_type": "bnpo"}, [4] * 4),
        ({"loss_type": "dapo", "entropy_coef": 0.1}, [4] * 4),
    ],
    ids=str,
)
def test_an_optimizer_step_is_packed_as_one(model, monkeypatch, options, calls):
    """TRL spreads its groups over micro-batches of four."""
    import grpo_fast.integrations.trl as integration

    seen, original = [], integration.grpo_backward

    def spied(model, groups, **more):
        seen.append(sorted(len(group.completion_ids) for group in groups))
        return original(model, groups, **more)

    monkeypatch.setattr(integration, "grpo_backward", spied)
    micro = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    # Adam makes steps of what gradients near 0 are rounded by.
    micro |= {"learning_rate": 1e-3}
    assert_same_training(model, **micro, **options)
    assert [
        step if isinstance(call, list) else sum(step)
        for step, call in zip(seen, calls, strict=True)
    ] == (calls)
    assert len(seen) == len(calls)


def test_what_was_made_ahead_is_gone_with_an_error(model, monkeypatch):
    trainer = trainer_of(
        drop_in(), model, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    backward = trainer.accelerator.backward
    calls = []

    def failing(loss, **more):
        calls.append(loss)
        if len(calls) == 1:
            raise RuntimeError("of a test")
        return backward(loss, **more)

    trainer.accelerator.backward = failing
    with pytest.raises(RuntimeError, match="of a test"):
        trainer.train()
    assert not trainer._ahead


def test_a_micro_batch_that_changes_after_its_gradient_was_made_is_an_error(model):
    trainer = trainer_of(
        drop_in(), model, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda batch: (
        prepare(batch) if trainer._step % 2 == 0 else dict(prepare(batch))
    )
    with pytest.raises(InputError, match="change them all before that one"):
        trainer.train()


def test_a_loss_that_is_scaled_afterwards_is_an_error(model):
    trainer = trainer_of(drop_in(), model)
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss, **more: backward(loss * 0.5, **more)
    with pytest.raises(InputError, match="multiplied by 0.5 after compute_loss"):
        trainer.train()
