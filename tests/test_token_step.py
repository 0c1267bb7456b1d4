"""A step in the log of tokens: its numbers are the oracle's, its push table a sum over all tokens,
its choice of groups what it says."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo_fast import Group, LossConfig, reference
from grpo_fast.rollout import Completion, ScoredGroup
from grpo_fast.step import group_logprobs, grpo_backward
from grpo_fast.tiny import tiny_model
from grpo_fast.token_choice import chosen_groups, evenly, kept_in_words
from grpo_fast.token_columns import push_table, step_columns
from grpo_fast.token_log import TokenLog, read_token_step, read_token_steps, read_vocabulary
from grpo_fast.token_step import Told, distances, log_tokens

VOCABULARY = 50
TOLD = Told(
    seed=3, eos_token_ids=(1,), advantage={"scale_rewards": "group"}, text_of=lambda i: f"<{i}>"
)
SHAPES = [(4, (3, 1, 6)), (7, (2, 5)), (9, (4, 4, 2, 3)), (3, (5, 1))]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_model().eval()


def groups_of(model, known: str) -> list[Group]:
    """Ragged groups, some completions end with EOS, one masked in part and one whole, one dead
    group; `known` log-probs lie around the model's own."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for number, (prompt, lengths) in enumerate(SHAPES):
        completions = [
            torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths
        ]
        completions[0][-1] = 1
        masks = [[1] * n for n in lengths]
        masks[-1][0] = 0
        advantages = torch.randn(len(lengths), generator=generator)
        prompt_ids = torch.randint(3, VOCABULARY, (prompt,), generator=generator).tolist()
        groups.append(
            Group(
                prompt_ids=prompt_ids,
                completion_ids=completions,
                advantages=0 * advantages if number == 1 else advantages,
                completion_masks=masks,
            )
        )
    own = iter(group_logprobs(model, groups))
    changed = []
    for group in groups:
        values = [next(own) for _ in group.completion_ids]
        near = {
            f"{name}_logprobs": [x + 0.3 * torch.randn(len(x), generator=generator) for x in values]
            for name in known.split()
        }
        changed.append(dataclasses.replace(group, **near))
    return changed


def scored_of(groups: list[Group]) -> list[ScoredGroup]:
    """Rewards in the order of the advantages, equal where those are 0."""
    made = []
    for number, group in enumerate(groups):
        advantages = group.advantages.tolist()
        completions = [
            Completion(list(ids), [], f"text {k}", "stop", a + number, {"f": a + number}, a)
            for k, (ids, a) in enumerate(zip(group.completion_ids, advantages, strict=True))
        ]
        prompt = SimpleNamespace(row=40 + number, text="p", token_ids=tuple(group.prompt_ids))
        made.append(ScoredGroup(prompt, completions, degenerate=not any(advantages)))
    return made


def slopes_of(model, groups: list[Group], config: LossConfig, denominator: float):
    """(slope, weight) of every token from the float64 oracle: autograd in the log-probs."""
    exact = tiny_model().double().eval()
    exact.load_state_dict(model.state_dict())
    parts = [(g, group, k) for g, group in enumerate(groups) for k in range(len(group.advantages))]
    logits = []
    for _, group, k in parts:
        ids = torch.tensor([[*group.prompt_ids, *group.completion_ids[k]]])
        logits.append(exact(ids).logits[0, len(group.prompt_ids) - 1 : -1].detach())
    lengths = torch.tensor([len(rows) for rows in logits])
    logits = torch.cat(logits).requires_grad_()

    def cat(name):
        values = [getattr(group, name) for _, group, _ in parts]
        if values[0] is None:
            return None
        rows = [torch.as_tensor(v[k]) for v, (_, _, k) in zip(values, parts, strict=True)]
        return torch.cat(rows)

    given = {n: cat(f"{n}_logprobs") for n in ("old", "ref", "sampler")}
    targets = cat("completion_ids")
    advantages = torch.tensor([float(group.advantages[k]) for _, group, k in parts])
    rows = reference.grpo_loss(
        logits,
        targets,
        advantages.double().repeat_interleave(lengths),
        mask=cat("completion_masks").bool(),
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).long(),
        group_ids=torch.tensor([g for g, _, _ in parts]),
        denominator=denominator,
        config=config,
        **{f"{name}_logp": None if v is None else v.double() for name, v in given.items()},
    )
    (gradient,) = torch.autograd.grad(rows.loss.sum(), logits)
    # d(loss) / d(logits) = slope / T (one-hot - p): its entry at the target is slope / T (1 - p).
    p = (logits / config.temperature).softmax(-1).gather(1, targets[:, None])[:, 0]
    own = gradient.gather(1, targets[:, None])[:, 0]
    return (own / (1 - p) * config.temperature).detach().numpy()


CONFIGS = {
    "on policy": (LossConfig(), ""),
    "clip": (LossConfig(loss_type="grpo"), "old"),
    "kl": (LossConfig(beta=0.1), "old ref"),
    "gspo": (LossConfig(loss_type="gspo", beta=0.1), "old ref"),
    "dr_grpo": (LossConfig(loss_type="dr_grpo", max_completion_length=8), "old"),
    "prompt mean": (LossConfig(aggregation="prompt_mean"), "old"),
    "temperature": (LossConfig(temperature=0.7), "old"),
    "corrected": (LossConfig(importance_sampling_correction="token_truncate"), "sampler"),
    "sequence corrected": (
        LossConfig(importance_sampling_correction="sequence_truncate"),
        "old sampler",
    ),
    "top entropy": (LossConfig(top_entropy_quantile=0.5, beta=0.1), "old ref"),
    "vespo": (LossConfig(loss_type="vespo"), "old"),
    "off-policy mask": (LossConfig(off_policy_mask_threshold=0.05), "old sampler"),
}
# The quantile is one of each packed row: the oracle sees one row.
CUTS = {"rows": {"token_budget": 24, "chunking": "on"}, "whole": {"token_budget": 1000}}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_slopes_and_push_table_are_the_oracle_s(model, name, cut):
    config, known = CONFIGS[name]
    groups = groups_of(model, known)
    output = grpo_backward(model, groups, loss=config, share_prompts="on", **CUTS[cut])
    columns = step_columns(groups, output, config)
    if name == "top entropy" and cut == "rows":
        keep = columns.arrays["keep"]
        assert set(keep.tolist()) == {0.0, 1.0}
        return
    truth = slopes_of(model, groups, config, output.tokens.denominator)
    # Float32 forwards of this model are 1e-6 from the float64 one.
    scale = np.abs(truth).max()
    assert scale > 0
    assert np.abs(columns.slope - truth).max() <= 2e-5 * scale
    ids = columns.arrays["token_ids"]
    push = push_table(columns, (1,), most=4)
    sums = {i: -truth[ids == i].sum() for i in set(ids.tolist())}
    assert push["eos"] == pytest.approx(sums[1], abs=1e-4 * scale)
    # By value: ids may have the same push.
    ordered = sorted(sums.values())
    near = 1e-4 * scale
    assert [v for _, v in push["up"]] == pytest.approx(
        [v for v in ordered[:-5:-1] if v > 0], abs=near
    )
    assert [v for _, v in push["down"]] == pytest.approx(
        [v for v in ordered[:4] if v < 0], abs=near
    )
    for i, value in push["up"] + push["down"]:
        assert value == pytest.approx(sums[i], abs=near)


def test_gradient_mass_is_the_slope_s(model):
    """Two numbers of the loss for every token: one is a bound of the other."""
    config, known = CONFIGS["top entropy"]
    groups = groups_of(model, known)
    output = grpo_backward(model, groups, loss=config, **CUTS["rows"])
    columns = step_columns(groups, output, config)
    live = columns.arrays["mask"]
    # sqrt((1 - p)^2 + sum of the other p^2) is at most sqrt(2) (1 - p) and at least 1 - p.
    least = np.abs(columns.slope) * -np.expm1(columns.arrays["logprobs"])
    mass = columns.arrays["gradient_mass"]
    assert (mass[live] >= least[live] * (1 - 1e-4)).all()
    assert (mass[live] <= math.sqrt(2) * least[live] * (1 + 1e-4)).all()


def test_columns_are_those_of_the_step(model):
    config, known = CONFIGS["kl"]
    groups = groups_of(model, known)
    output = grpo_backward(model, groups, loss=config, **CUTS["rows"])
    columns = step_columns(groups, output, config)
    live = columns.arrays["mask"]
    assert columns.offsets[-1] == len(live) == sum(len(x) for x in output.logprobs)
    for name in ("logprobs", "entropy", "ratio", "kl", "gradient_mass"):
        made = getattr(output.tokens, name).numpy()
        assert np.array_equal(columns.arrays[name][live], made[live]), name
        assert np.isnan(columns.arrays[name][~live]).all(), name
        assert (made[~live] == 0).all(), f"{name} of the output was changed"
    assert columns.weights[:-1] == pytest.approx(1 / output.tokens.denominator)
    assert np.isnan(columns.weights[-1]), "it is masked whole"


def test_a_completion_that_teaches_nothing_has_no_numbers_and_no_push(model):
    groups = groups_of(model, "")
    output = grpo_backward(model, groups)
    columns = step_columns(groups, output, LossConfig())
    dead = slice(columns.offsets[3], columns.offsets[5])
    assert np.isnan(columns.arrays["logprobs"][dead]).all()
    assert (columns.slope[dead] == 0).all()
    assert np.isfinite(columns.slope).all()


def test_a_nan_of_the_step_is_not_taken_for_a_dead_completion(model):
    groups = groups_of(model, "old")
    groups[0].old_logprobs[0][0] = torch.nan
    output = grpo_backward(model, groups)
    columns = step_columns(groups, output, LossConfig())
    assert np.isnan(columns.slope[0])


def logged(tmp_path, model, name="kl", **options):
    config, known = CONFIGS[name]
    groups = groups_of(model, known)
    output = grpo_backward(model, groups, loss=config)
    scored = scored_of(groups)
    log = TokenLog(tmp_path, budget_mb=1, max_steps=4)
    metrics = log_tokens(log, TOLD, scored, groups, output, config, step=1, iteration=1, **options)
    return groups, output, scored, metrics, read_token_step(tmp_path, 1)


def test_what_is_kept_is_the_completions_own(tmp_path, model):
    groups, output, scored, metrics, step = logged(tmp_path, model)
    meta = step.meta
    assert meta["push"]["eos"] == metrics["push/eos"]
    assert meta["iteration"] == 1
    assert meta["loss"]["beta"] == 0.1
    assert meta["advantage"] == {"scale_rewards": "group"}
    assert (meta["eos_token_id"], meta["eos_token_ids"]) == (1, [1])
    lengths = [len(ids) for group in groups for ids in group.completion_ids]
    tokens = sum(sum(mask) for group in groups for mask in group.completion_masks)
    assert meta["totals"] == {
        "groups": 4,
        "completions": 11,
        "sequences": 11,
        "tokens": tokens,
        "max_completion_length": max(lengths),
    }
    assert meta["denominator"] == tokens
    first = np.cumsum([0, *(len(group.completion_ids) for group in groups)])
    at = 0
    for group in meta["groups"]:
        g = group["index"]
        assert group["row"] == 40 + g
        assert group["prompt_ids"] == groups[g].prompt_ids
        assert group["advantages"] == groups[g].advantages.tolist()
        rewards = [c["reward"] for c in group["completions"]]
        assert rewards == sorted(rewards, reverse=True)
        for c in group["completions"]:
            k = c["index"]
            assert (c["start"], c["stop"]) == (at, at + len(groups[g].completion_ids[k]))
            at = c["stop"]
            here = slice(c["start"], c["stop"])
            mask = np.array(groups[g].completion_masks[k], bool)
            assert step.arrays["token_ids"][here].tolist() == groups[g].completion_ids[k]
            assert np.array_equal(step.arrays["mask"][here], mask)
            ours = step.arrays["logprobs"][here][mask]
            assert np.array_equal(ours, output.logprobs[first[g] + k].numpy()[mask])
            old = step.arrays["old_logprobs"][here][mask]
            assert np.array_equal(old, groups[g].old_logprobs[k].numpy()[mask])
            assert c["text"] == scored[g].completions[k].text
            assert c["weight"] == (pytest.approx(1 / tokens) if mask.any() else None)
    assert at == len(step.arrays["mask"])


def test_without_a_normaliser_of_one_number_the_weight_says_it(tmp_path, model):
    groups, _, _, _, step = logged(tmp_path, model, "clip")
    assert step.meta["denominator"] is None
    for group in step.meta["groups"]:
        for c in group["completions"]:
            live = sum(groups[group["index"]].completion_masks[c["index"]])
            assert c["weight"] == (pytest.approx(1 / 11 / live) if live else None)


def test_on_policy_there_are_no_old_log_probs_and_no_kl(tmp_path, model):
    *_, step = logged(tmp_path, model, "on policy")
    assert not step.arrays.keys() & {"old_logprobs", "ref_logprobs", "sampler_logprobs", "kl"}
    ratio = step.arrays["ratio"]
    assert set(ratio[np.isfinite(ratio)].tolist()) == {1.0}
    reasons = {reason for group in step.meta["groups"] for reason in group["chosen_by"]}
    assert "widest_rewards" in reasons
    assert "widest rewards" in step.meta["kept"]


def test_without_a_log_the_push_is_measured_all_the_same(model):
    groups = groups_of(model, "")
    output = grpo_backward(model, groups)
    told = TOLD._replace(eos_token_ids=())
    for source, names in ((TOLD, {"push/eos"}), (told, set())):
        found = log_tokens(
            None, source, scored_of(groups), groups, output, LossConfig(), step=1, iteration=0
        )
        assert found.keys() == names


def test_kl_is_measured_to_whom_it_says(model):
    for known, names in (
        ("", set()),
        ("ref", set()),
        ("old", {"kl/old_k3"}),
        ("sampler", {"kl/sampler_k3"}),
        ("old sampler", {"kl/old_k3", "kl/sampler_k3"}),
    ):
        groups = groups_of(model, known)
        if "sampler" in known:
            groups[0].sampler_logprobs[0].fill_(math.nan)
        config = LossConfig(skip_zero_advantage=False)
        output = grpo_backward(model, groups, loss=config)
        found = log_tokens(
            None, TOLD, scored_of(groups), groups, output, config, step=1, iteration=0
        )
        assert found.keys() - {"push/eos"} == names

        def flat(name, groups=groups):
            return torch.cat([x for group in groups for x in getattr(group, name)]).double()

        mask = torch.tensor([m for g in groups for ms in g.completion_masks for m in ms]).bool()
        own = torch.cat(output.logprobs).double()
        old = flat("old_logprobs") if "old" in known else own
        for name in names:
            d = own - old if name == "kl/old_k3" else old - flat("sampler_logprobs")
            d = d[mask & ~d.isnan()]
            assert found[name] == pytest.approx(float((d.exp() - 1 - d).mean()), rel=1e-5)


def test_a_user_s_objective_is_named(tmp_path, model):
    def mine(tokens, config):
        return -tokens.advantages * tokens.logprobs

    groups = groups_of(model, "")
    config = LossConfig(objective=mine)
    output = grpo_backward(model, groups, loss=config)
    log = TokenLog(tmp_path, budget_mb=1, max_steps=4)
    log_tokens(log, TOLD, scored_of(groups), groups, output, config, step=1, iteration=0)
    assert "mine" in read_token_step(tmp_path, 1).meta["loss"]["objective"]


def test_a_step_of_nan_is_kept_as_nan(tmp_path, model):
    """The step that one wants to see: nothing in it is finite."""
    groups = groups_of(model, "old")
    output = grpo_backward(model, groups)
    for values in output.logprobs:
        values.fill_(torch.nan)
    log = TokenLog(tmp_path, budget_mb=1, max_steps=4)
    log_tokens(log, TOLD, scored_of(groups), groups, output, LossConfig(), step=1, iteration=0)
    step = read_token_step(tmp_path, 1)
    assert np.isnan(step.arrays["logprobs"]).all()
    json.dumps(step.meta, allow_nan=False)


def test_tensors_and_ids_that_are_none_where_masked(tmp_path, model):
    groups = groups_of(model, "old")
    tensors = [
        dataclasses.replace(
            group,
            completion_ids=[torch.tensor(ids) for ids in group.completion_ids],
            completion_masks=[torch.tensor(mask) for mask in group.completion_masks],
        )
        for group in groups
    ]
    assert not tensors[2].completion_masks[-1][0]
    output = grpo_backward(model, tensors)
    columns = step_columns(groups, output, LossConfig())
    # As hosts mark what is not to be learned; the loss does not look at it.
    tensors[2].completion_ids[-1][0] = -100
    again = step_columns(tensors, output, LossConfig())
    assert np.array_equal(again.slope, columns.slope)
    assert push_table(again, (1,)) == push_table(columns, (1,))
    log = TokenLog(tmp_path, budget_mb=1, max_steps=1)
    scored = scored_of(groups)
    log_tokens(log, TOLD, scored, tensors, output, LossConfig(), step=1, iteration=0)
    assert -100 in read_token_step(tmp_path, 1).arrays["token_ids"]
    assert min(read_vocabulary(tmp_path)) >= 0


def test_a_step_that_is_masked_whole_pushes_nothing(model):
    masked = [
        dataclasses.replace(
            group, completion_masks=[[0] * len(ids) for ids in group.completion_ids]
        )
        for group in groups_of(model, "")
    ]
    output = grpo_backward(model, masked)
    found = push_table(step_columns(masked, output, LossConfig()), (1,))
    assert found == {"up": [], "down": [], "eos": 0.0}


def test_steps_beyond_the_budget_are_measured_and_not_kept(tmp_path, model):
    groups = groups_of(model, "")
    output = grpo_backward(model, groups)
    log = TokenLog(tmp_path, budget_mb=0.02, max_steps=20)
    found = [
        log_tokens(
            log, TOLD, scored_of(groups), groups, output, LossConfig(), step=step, iteration=0
        )
        for step in range(1, 21)
    ]
    kept = read_token_steps(tmp_path)
    assert 2 <= len(kept) < 20
    assert kept[0] == 1
    assert kept[-1] == 20
    assert found[-1]["tokens/steps_kept"] == len(kept)
    assert found[-1]["tokens/mb"] <= 0.02
    assert len({row["push/eos"] for row in found}) == 1


def test_groups_are_chosen_for_what_they_are():
    nan = math.nan
    rewards = [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.5, 0.5], [nan, nan], [0.2, 0.4], [0.3, 0.4]]
    dead = [False, True, True, True, True, False, False]
    distance = {"highest_kl": [0.1, nan, nan, nan, nan, 0.9, 0.2]}
    chosen = chosen_groups(rewards, dead, distance, seed=0, step=1)
    assert chosen == chosen_groups(rewards, dead, distance, seed=0, step=1)
    assert chosen[1] == ["best"]
    assert chosen[2] == ["worst"]
    assert chosen[5] == ["highest_kl"]
    assert next(g for g, why in chosen.items() if "degenerate" in why) in (3, 4)
    assert len(chosen) == 5
    picks = [chosen_groups(rewards, dead, distance, seed=0, step=s) for s in range(40)]
    at_random = {g for pick in picks for g, why in pick.items() if "random" in why}
    assert at_random == {0, 3, 4, 6}, "every group that is not shown yet has its chance"


def test_one_group_is_chosen_once_for_every_reason():
    chosen = chosen_groups([[0.0, 1.0]], [False], {"highest_kl": [0.1]}, seed=0, step=1)
    assert chosen == {0: ["best", "worst", "highest_kl", "random"]}
    assert chosen_groups([], [], {"highest_kl": []}, seed=0, step=1) == {}


def test_kept_says_how_many_of_how_many():
    chosen = {3: ["best", "random"], 5: ["highest_kl_sampler"]}
    assert kept_in_words(chosen, 64, [256, 8]) == (
        "2 of 64 groups: best, highest KL to the sampler, random; at most 16 of 256 completions a "
        "group, best to worst"
    )
    assert kept_in_words(chosen, 2, [8, 8]).endswith("; all completions of a group")


@pytest.mark.parametrize("count, most", [(1, 1), (5, 16), (16, 16), (17, 16), (1024, 16), (9, 4)])
def test_completions_are_best_worst_and_evenly_between(count, most):
    picks = evenly(count, most)
    assert picks == sorted(set(picks))
    assert len(picks) == min(count, most)
    assert picks[0] == 0
    assert most == 1 or picks[-1] == count - 1
    gaps = np.diff(picks)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    "known, name",
    [("old ref", "highest_kl"), ("old", "highest_kl_old"), ("sampler", "highest_kl_sampler")],
)
def test_the_distance_says_what_it_is_to(model, known, name):
    groups = groups_of(model, known)
    output = grpo_backward(model, groups, loss=LossConfig(skip_zero_advantage=False))
    columns = step_columns(groups, output, LossConfig())
    found = distances(columns, scored_of(groups))
    assert list(found) == [name]
    other = known.split()[-1]
    at = 0
    for g, group in enumerate(groups):
        masks = torch.cat([torch.tensor(mask) for mask in group.completion_masks]).bool()
        own = torch.cat(output.logprobs[at : at + len(group.completion_ids)])[masks]
        at += len(group.completion_ids)
        d = own - torch.cat(list(getattr(group, f"{other}_logprobs")))[masks]
        # k3 with the policy's tokens for the reference, with the other's for old and sampler.
        d = -d if other == "ref" else d
        assert found[name][g] == pytest.approx(float((d.exp() - 1 - d).mean()), rel=1e-4)
