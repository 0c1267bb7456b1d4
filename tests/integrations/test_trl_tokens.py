"""The token log of TRL's trainer and of the drop-in at every depth: an eager float64 recomputation,
and no bit of the training changed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl_training import (
    MARKS,
    answer,
    assert_same_logs,
    drop_in,
    host_class,
    recorded,
    rollout,
    short,
    trained,
    with_sampler,
)

from grpo_fast.errors import ConfigError
from grpo_fast.integrations import trl_tokens
from grpo_fast.integrations.trl_columns import columns_of, metric_columns
from grpo_fast.integrations.trl_tokens import HOOKED
from grpo_fast.records import open_records
from grpo_fast.report import report_page
from grpo_fast.tiny import tiny_model
from grpo_fast.token_columns import push_table
from grpo_fast.token_step import kl_metrics

pytestmark = MARKS
MICRO = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "epsilon": 0.05}
CASES = {
    "groups over micro-batches": MICRO | {"loss_type": "dapo"},
    "two iterations": MICRO | {"loss_type": "grpo", "num_iterations": 2, "max_steps": 4},
    "a mean of the micro-batch": MICRO | {"loss_type": "bnpo"},
    "groups over two steps": MICRO | {"loss_type": "dr_grpo", "steps_per_generation": 4},
    "sequences": MICRO | {"importance_sampling_level": "sequence", "num_iterations": 2},
    "truncated": MICRO | {"loss_type": "dapo", "mask_truncated_completions": True},
}
# Every way once more where groups are shuffled, and where old log-probs are known.
RUNS = [(case, kind) for case in CASES for kind in ("TRL", "packed")]
RUNS += [(case, "fused") for case in list(CASES)[:3]]
RUNS += [("two iterations", "kernel"), ("groups over micro-batches", "own")]
BETA = 0.04


def kind_of(name, monkeypatch):
    if name == "TRL":
        return None
    monkeypatch.setattr(drop_in(), "depth", name)
    return drop_in()


def with_weights(found):
    """Keeps the weights before each step."""
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **more):
            found.append({name: x.detach().clone() for name, x in model.state_dict().items()})

    return Keep()


def eager(weights, prompt, ids):
    """(logits with a gradient, log-probs of all ids) of a completion, float64."""
    exact = tiny_model().double().eval()
    exact.load_state_dict(weights)
    with torch.no_grad():
        out = exact(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    logits = out.detach().requires_grad_()
    return logits, logits.log_softmax(-1)


def of_completion(weights, group, one, step, options):
    """What the formulas say of its tokens, and its part of the loss."""
    here = slice(one["start"], one["stop"])
    ids, mask = step.arrays["token_ids"][here], torch.tensor(step.arrays["mask"][here]).bool()
    prompt, picked = group["prompt_ids"], torch.tensor(ids.astype(int))[:, None]
    logits, now = eager(weights.now, prompt, ids)
    logp = now.gather(1, picked)[:, 0]
    before, reference = (
        eager(w, prompt, ids)[1].gather(1, picked)[:, 0].detach()
        for w in (weights.old, weights.first)
    )
    gap = logp - (before if "old_logprobs" in step.arrays else logp.detach())
    if options.get("importance_sampling_level") == "sequence":
        gap = ((gap * mask).sum() / mask.sum()).expand_as(gap)
    ratio, advantage = gap.exp(), one["advantage"]
    kl = ((reference - logp).exp() - (reference - logp) - 1) * (ratio if weights.biased else 1)
    term = -torch.minimum(ratio * advantage, ratio.clamp(1 - 0.05, 1 + 0.05) * advantage)
    loss = ((term + BETA * kl) * mask).sum() * (one["weight"] or 0.0)
    by_logit, by_logp = torch.autograd.grad(loss, [logits, logp], retain_graph=True)
    return SimpleNamespace(
        loss=loss.item(),
        slope=by_logp,
        mask=mask.numpy(),
        ids=ids,
        columns={
            "logprobs": logp,
            "entropy": -(now.exp() * now).sum(-1),
            "ratio": ratio,
            "kl": kl,
            "gradient_mass": by_logit.norm(dim=-1),
            "old_logprobs": before,
            "ref_logprobs": reference,
        },
    )


def assert_rewards(group, one, ids):
    """They are of this completion, and not of its neighbour in the shuffled batch."""
    (first,), (second,) = answer([ids.tolist()]), short([ids.tolist()])
    assert one["rewards"] == {"answer": first, "short": pytest.approx(second)}
    total = first + 0.5 * (second or 0.0)
    assert one["reward"] == pytest.approx(total)
    assert group["rewards"][one["index"]] == one["reward"]
    scores = torch.tensor(group["rewards"])
    advantage = (scores - scores.mean()) / (scores.std() + 1e-4)
    assert group["advantages"] == pytest.approx(advantage.tolist(), abs=1e-4)
    assert one["advantage"] == group["advantages"][one["index"]]
    assert one["finish_reason"] == ("stop" if ids[-1] == 1 else "length")


def assert_chosen(step):
    """The group of the highest KL has the highest of those that are kept."""
    means, highest = {}, None
    for group in step.meta["groups"]:
        spans = [np.arange(one["start"], one["stop"]) for one in group["completions"]]
        kl = step.arrays["kl"][np.concatenate(spans)]
        means[group["index"]] = np.nanmean(kl) if np.isfinite(kl).any() else -1.0
        highest = group["index"] if "highest_kl" in group["chosen_by"] else highest
    # Where nothing of the step is in the loss, none has a KL.
    assert means.get(highest, -1.0) == max(means.values())


@pytest.mark.parametrize("case, kind", RUNS)
def test_stored_tokens_are_an_eager_recomputation(model, tmp_path, monkeypatch, kind, case):
    options, snapshots = CASES[case], []
    spread = options.get("steps_per_generation", 2) // 2 * options.get("num_iterations", 1)
    trainer = recorded(
        model,
        tmp_path / "run",
        kind_of(kind, monkeypatch),
        adjust=lambda trainer: trainer.add_callback(with_weights(snapshots)),
        **options,
    )
    records = open_records(tmp_path / "run")
    every = list(range(1, trainer.args.max_steps + 1))
    last = trainer.args.max_steps
    assert records.tokens.steps() == (
        [k for k in every if k % 2 == 0 or k == last] if ("num_iterations" in options) else every
    )
    for number in records.tokens.steps():
        step = records.tokens.read(number)
        generated = (number - 1) // spread * spread
        weights = SimpleNamespace(
            now=snapshots[number - 1],
            old=snapshots[generated],
            first=snapshots[0],
            biased=trainer.args.use_bias_correction_kl,
        )
        loss, stored, push = 0.0, 0, np.zeros(50)
        assert_chosen(step)
        assert ("old_logprobs" in step.arrays) == (spread > 1)
        for group in step.meta["groups"]:
            for one in group["completions"]:
                found = of_completion(weights, group, one, step, options)
                here = slice(one["start"], one["stop"])
                assert_rewards(group, one, found.ids)
                loss, stored = loss + found.loss, stored + 1
                np.add.at(push, found.ids[found.mask], -found.slope.numpy()[found.mask])
                for name, values in found.columns.items():
                    if name == "old_logprobs" and spread == 1:
                        continue
                    column = step.arrays[name][here]
                    assert np.isnan(column[~found.mask]).all()
                    column, values = column[found.mask], values.detach().numpy()[found.mask]
                    if name == "gradient_mass" and kind in ("TRL", "kernel", "own"):
                        assert np.isnan(column).all()
                        continue
                    # Float32 against float64; entropies are stored as float16.
                    near = 2e-3 if name == "entropy" else 2e-5
                    np.testing.assert_allclose(column, values, rtol=near, atol=2e-6, err_msg=name)
        row = records.rows[number - 1]
        assert row["push/eos"] == step.meta["push"]["eos"]
        if stored == step.meta["totals"]["completions"]:
            assert loss == pytest.approx(row["loss"], abs=2e-6)
            pairs = [*step.meta["push"]["up"], *step.meta["push"]["down"]]
            assert [v for _, v in pairs] == pytest.approx([push[i] for i, _ in pairs], abs=2e-6)
            assert row["push/eos"] == pytest.approx(push[1], abs=2e-6)
        else:
            assert case == "groups over two steps"
            assert "of this optimizer step" in step.meta["kept"]
    assert "xray-data" in report_page(records)


@pytest.mark.parametrize(
    "case", ["two iterations", "sequences", "a mean of the micro-batch", "dead"]
)
@pytest.mark.parametrize("kind", ["packed", "fused"])
def test_what_the_loss_gives_is_what_follows_from_its_log_probs(
    model, tmp_path, monkeypatch, kind, case
):
    seen = []

    def spied(batches, pad):
        seen.append((batches, pad))
        return columns_of(batches, pad)

    def half(completion_ids, prompts, **columns):
        """The same for all of a group where the prompt is short: without KL not forwarded."""
        parts = zip(prompts, completion_ids, strict=True)
        return [float(len(prompt) > 1 and ids[0] % 2) for prompt, ids in parts]

    monkeypatch.setattr(trl_tokens, "columns_of", spied)
    dead = {"reward": (half,), "beta": 0.0, "num_iterations": 2, "max_steps": 4}
    options = MICRO | dead if case == "dead" else CASES[case]
    recorded(model, tmp_path / "run", kind_of(kind, monkeypatch), **options)
    left_out, steepest = 0, 0.0
    for batches, pad in seen:
        assert all("slope" in batch.made for batch in batches)
        given, rows = columns_of(batches, pad)
        bare = [batch._replace(made={}) for batch in batches]
        follows, others = columns_of(bare, pad)
        left_out += sum(int(batch.made["ratio"].isnan().sum()) for batch in batches)
        # Two ways to one float32: a few roundings of numbers of order 1.
        near = {"rtol": 2e-6, "atol": 1e-8}
        np.testing.assert_allclose(given.slope, follows.slope, **near)
        for name, values in given.arrays.items():
            if name != "gradient_mass":
                np.testing.assert_allclose(values, follows.arrays[name], **near, err_msg=name)
        live = given.arrays["mask"]
        assert np.isfinite(given.arrays["gradient_mass"][live]).all()
        assert ((given.arrays["gradient_mass"] > 0) == (given.slope != 0))[live].all()
        assert rows == others
        steepest = max(steepest, np.abs(given.slope).max())
        for one in (batches, bare):
            less = metric_columns(one, pad)
            assert kl_metrics(less) == pytest.approx(kl_metrics(given), rel=1e-6)
            push = push_table(less, [1])["eos"]
            assert push == pytest.approx(push_table(given, [1])["eos"], rel=1e-5, abs=1e-9)
    assert steepest > 0.001
    assert (left_out > 0) == (case == "dead" and kind == "packed")


@pytest.mark.parametrize("kind", ["TRL", "packed", "fused"])
def test_no_number_of_the_training_changes(model, tmp_path, monkeypatch, kind):
    options = {"reward": [answer, short], "beta": BETA, "eval_strategy": "steps", "eval_steps": 2}
    options |= MICRO | {"num_iterations": 2, "max_steps": 4, "per_device_eval_batch_size": 4}
    kind = kind_of(kind, monkeypatch) or host_class()
    plain = trained(kind, model, **options, reward_weights=[1.0, 0.5])
    before = {name for name in vars(plain) if not callable(getattr(plain, name))}
    watched = recorded(model, tmp_path / "run", kind, **options)
    assert open_records(tmp_path / "run").tokens.steps() == [2, 4]
    assert_same_logs(plain.state.log_history, watched.state.log_history, exact=True)
    theirs, ours = (dict(x.model.named_parameters()) for x in (plain, watched))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    after = {name for name in vars(watched) if not callable(getattr(watched, name))}
    assert after == before
    assert not vars(watched).keys() & set(HOOKED)


def test_zero_keeps_none_and_leaves_the_trainer_alone(model, tmp_path):
    seen = []

    def adjust(trainer):
        compute = trainer.compute_loss
        trainer.compute_loss = lambda *args, **more: (
            seen.append(vars(trainer).keys() & set(HOOKED)),
            compute(*args, **more),
        )[1]

    recorded(model, tmp_path / "run", more={"log_tokens_mb": 0}, adjust=adjust, max_steps=1)
    assert seen == [set()]
    records = open_records(tmp_path / "run")
    assert records.tokens is None
    assert "push/eos" not in records.rows[0]
    with pytest.raises(ConfigError, match="log_tokens_mb = -1, expected a number from 0 up"):
        recorded(model, tmp_path / "other", more={"log_tokens_mb": -1})


def test_a_budget_is_spread_over_the_steps(model, tmp_path):
    recorded(model, tmp_path / "run", more={"log_tokens_mb": 0.03}, max_steps=8)
    records = open_records(tmp_path / "run")
    steps = records.tokens.steps()
    assert steps[0] == 1
    assert 2 <= len(steps) < 8
    assert [row["tokens/steps_kept"] for row in records.rows][-1] == len(steps)


def test_rows_of_several_steps_have_the_mean(model, tmp_path):
    recorded(model, tmp_path / "each", max_steps=4)
    recorded(model, tmp_path / "some", max_steps=4, logging_steps=2)
    each, some = (open_records(tmp_path / name).rows for name in ("each", "some"))
    push = [row["push/eos"] for row in each]
    means = [(push[0] + push[1]) / 2, (push[2] + push[3]) / 2]
    assert [row["push/eos"] for row in some] == pytest.approx(means)


@pytest.mark.parametrize("kind", ["TRL", "packed"])
def test_words_of_an_environment_and_the_sampler_s_log_probs(model, tmp_path, monkeypatch, kind):
    adjust = with_sampler(vllm_importance_sampling_mode="token_truncate")
    recorded(
        model, tmp_path / "run", kind_of(kind, monkeypatch), adjust=adjust, rollout_func=rollout
    )
    records = open_records(tmp_path / "run")
    assert records.rows[-1]["kl/sampler_k3"] > 0
    step = records.tokens.read(2)
    assert np.isfinite(step.arrays["sampler_logprobs"][step.arrays["mask"] == 1]).sum() > 10
    masked = 0
    for group in step.meta["groups"]:
        for one in group["completions"]:
            here = slice(one["start"], one["stop"])
            # `rollout` marks the second token of most as one of the environment.
            live = step.arrays["mask"][here]
            assert not live.any() or live.tolist() == [int(t != 1) for t in range(len(live))]
            assert np.isnan(step.arrays["logprobs"][here][live == 0]).all()
            masked += (live == 0).sum()
    assert masked > 4


def test_a_loss_that_is_not_known_has_no_slope(model, tmp_path, caplog):
    recorded(model, tmp_path / "run", loss_type="cispo", beta=0.0)
    assert "the token log has no ratio and no slope" in caplog.text
    records = open_records(tmp_path / "run")
    step = records.tokens.read(1)
    assert (step.meta["loss"], "push" in step.meta) == (None, False)
    assert np.isnan(step.arrays["ratio"]).all()
    assert np.isfinite(step.arrays["logprobs"]).all()
    assert "push/eos" not in records.rows[0]
    assert '"loss_known":false' in report_page(records)


def test_a_trainer_of_another_loss_is_told_in_one_line(model, tmp_path, caplog):
    class Other(host_class()):
        def _compute_loss(self, model, inputs):
            return 2 * super()._compute_loss(model, inputs)

    recorded(model, tmp_path / "run", Other, max_steps=1)
    assert "the loss is that of" in caplog.text
    assert open_records(tmp_path / "run").tokens.read(1).meta["loss"] is None


def test_an_advantage_a_token_is_not_kept(model, tmp_path, monkeypatch, caplog):
    def adjust(trainer):
        score = trainer._generate_and_score_completions

        def scored(inputs):
            output = score(inputs)
            spread = output["advantages"][:, None].expand(output["completion_ids"].shape)
            return output | {"advantages": spread.contiguous()}

        trainer._generate_and_score_completions = scored

    recorded(model, tmp_path / "run", drop_in(), adjust=adjust, max_steps=2)
    assert caplog.text.count("a step is not kept token by token: it has an advantage a token") == 1
    assert open_records(tmp_path / "run").tokens is None


def test_a_training_that_failed_can_be_begun_again(model, tmp_path):
    def failing(completion_ids, **columns):
        raise RuntimeError("of a test")

    trainers = []
    with pytest.raises(RuntimeError, match="of a test"):
        recorded(model, tmp_path / "run", reward=(failing,), adjust=trainers.append)
    (trainer,) = trainers
    assert "_compute_loss" in vars(trainer)
    trainer.reward_funcs = [answer]
    (callback,) = (x for x in trainer.callback_handler.callbacks if hasattr(x, "_tokens"))
    callback._run.close()
    trainer.train()
    assert open_records(tmp_path / "run").tokens.steps() == [1, 2, 3]
    assert not vars(trainer).keys() & set(HOOKED)
