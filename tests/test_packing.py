"""Groups to packed rows: nothing lost, the budget hard, prompts once where it pays, and each
completion token beside the state that predicts it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fast import ConfigError, InputError, LossConfig
from grpo_fast.collate import collate, collate_chunk
from grpo_fast.groups import Group, Member, make_groups, members
from grpo_fast.layout import PromptLeaves
from grpo_fast.packing import best_fit, group_budget, pack, padded_tokens

CPU = torch.device("cpu")
EVERYTHING = LossConfig(skip_zero_advantage=False)


def group(prompt: int, *lengths: int, **more) -> Group:
    """A group of a prompt and completions of these lengths, all ids distinct."""
    ids = iter(range(1, 10**6))
    prompt_ids = [next(ids) for _ in range(prompt)]
    completions = [[next(ids) for _ in range(length)] for length in lengths]
    more = {"advantages": [float(k + 1) for k in range(len(lengths))]} | more
    return Group(prompt_ids=prompt_ids, completion_ids=completions, **more)


def placed(packing) -> list[Member]:
    """Every completion that a packing knows, wherever it is."""
    found = [Member(p.group, k) for row in packing.rows for p in row for k in p.completions]
    found += [Member(c.group, k) for c in packing.chunks for row in c.rows for k in row]
    return sorted(found + packing.masked + packing.dead)


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=6)
shapes = st.lists(st.tuples(st.integers(1, 9), lengths), min_size=0, max_size=5)


@settings(max_examples=200, deadline=None)
@given(
    shapes,
    st.integers(18, 80),
    st.sampled_from(["auto", "on", "off"]),
    st.sampled_from(["auto", "on", "off"]),
)
def test_every_completion_once_and_within_the_budget(shapes, budget, sharing, chunking):
    groups = [group(prompt, *sizes) for prompt, sizes in shapes]
    packing = pack(groups, EVERYTHING, budget, sharing=sharing, chunking=chunking)
    assert placed(packing) == sorted(members(groups))
    total = 0
    for parts in packing.rows:
        row = collate(groups, parts, [1] * len(groups), CPU)
        total += row.input_ids.numel()
        assert row.input_ids.numel() == sum(part.tokens for part in parts) <= budget
    for chunks in packing.chunks:
        prompt = len(groups[chunks.group].prompt_ids)
        total += prompt
        for keys in chunks.rows:
            row = collate_chunk(
                groups, chunks.group, keys, PromptLeaves(trained=True), [1] * 5, CPU
            )
            total += row.input_ids.numel()
            assert prompt + row.input_ids.numel() <= budget
    assert packing.tokens == total
    if sharing == "off":
        assert packing.tokens == packing.tokens_alone


@settings(max_examples=100, deadline=None)
@given(shapes, st.booleans())
def test_each_token_lies_behind_the_state_that_predicts_it(shapes, share):
    groups = [group(prompt, *sizes) for prompt, sizes in shapes]
    packing = pack(groups, EVERYTHING, 10**6, sharing="on" if share else "off")
    for parts in packing.rows:
        row = collate(groups, parts, [1] * len(groups), CPU)
        ids, positions = row.input_ids[0], row.position_ids[0]
        at = 0
        for g, k in row.members:
            prompt, completion = groups[g].prompt_ids, groups[g].completion_ids[k]
            states = row.predictors[at : at + len(completion)]
            assert row.targets[at : at + len(completion)].tolist() == completion
            # what the predicting states have read: the last prompt token, then the completion
            assert ids[states].tolist() == [prompt[-1], *completion[:-1]]
            first = len(prompt) - 1
            assert positions[states].tolist() == list(range(first, first + len(completion)))
            at += len(completion)
        assert at == len(row.targets) == row.cu_seqlens[-1]


def test_the_largest_row_comes_first():
    packing = pack([group(3, 1, 8, 2), group(2, 9, 1)], EVERYTHING, 12, sharing="off")
    tokens = [sum(part.tokens for part in row) for row in packing.rows]
    assert tokens == sorted(tokens, reverse=True)


def test_best_fit_fills_the_fullest_bin_that_has_room():
    assert best_fit({0: 5, 1: 4, 2: 3, 3: 3, 4: 1}, 8) == [(0, 2), (1, 3, 4)]
    assert best_fit({}, 8) == []
    assert best_fit({7: 0, 8: 0}, 0) == [(7, 8)]


@pytest.mark.parametrize(
    "prompt, completion, count, share",
    [(100, 100, 8, True), (10, 100, 8, False), (100, 100, 1, False), (17, 90, 64, True)],
)
def test_a_prompt_is_shared_where_it_saves_more_than_15_percent(prompt, completion, count, share):
    made = group(prompt, *[completion] * count)
    packing = pack([made], None, 10**6)
    assert {part.shared for row in packing.rows for part in row} == {share}
    saved = 1 - packing.tokens / packing.tokens_alone
    assert (saved > 0.15) is share


def test_a_group_above_the_budget_is_cut_with_its_prompt_once_or_in_every_row():
    big = group(40, *[11] * 12)
    packing = pack([big], None, 80)
    (chunks,) = packing.chunks
    assert not packing.rows
    assert [len(row) for row in chunks.rows] == [4, 4, 4]
    assert packing.tokens == 40 + 12 * 10
    again = pack([big], None, 80, chunking="off")
    assert not again.chunks
    assert again.tokens == 3 * 40 + 12 * 10


@pytest.mark.parametrize(
    "device, lengths, budget",
    [
        ("cpu", (100, 50, 60), 100 + 2048),
        ("cpu", (100, 3000, 60), 3100),
        ("cuda", (100, 50, 60), 16384),
        ("cuda", (9000, 50, 8000), 17000),
    ],
)
def test_a_row_without_a_budget_has_its_devices_size_and_holds_a_sequence(device, lengths, budget):
    assert group_budget([group(*lengths), group(1, 1)], torch.device(device)) == budget
    assert group_budget([], torch.device(device)) <= budget


def test_a_window_shorter_than_the_longest_sequence_keeps_prompts_apart():
    made = [group(20, 5, 5, 9), group(10, 4, 4, 4)]
    packing = pack(made, None, 10**6, window=20)
    assert {p.group: p.shared for row in packing.rows for p in row} == {0: False, 1: True}


def test_what_teaches_nothing_is_left_out_and_noted():
    dead = group(4, 3, 3, advantages=[0.0, 0.0])
    half = group(4, 3, 3, advantages=[0.0, 1.0])
    masked = group(4, 3, 2, 0, completion_masks=[[1, 1, 1], [0, 0], []])
    groups = [dead, half, masked]
    packing = pack(groups, LossConfig(), 100)
    assert packing.dead == [(0, 0), (0, 1), (1, 0)]
    assert packing.masked == [(2, 1), (2, 2)]
    for config in (
        LossConfig(beta=0.1),
        LossConfig(entropy_coef=0.1),
        LossConfig(top_entropy_quantile=0.5),
        EVERYTHING,
    ):
        assert pack(groups, config, 100).dead == []
    everyone = pack(groups, None, 100)
    assert everyone.dead == []
    assert everyone.masked == [(2, 2)], "an empty completion has no log-probs"


def test_padded_tokens_are_those_of_one_padded_batch():
    assert padded_tokens([group(3, 1, 8), group(5, 2)]) == 3 * (5 + 8)
    assert padded_tokens([]) == 0


def test_per_token_values_travel_with_their_tokens():
    groups = [
        group(2, 3, 1, old_logprobs=[torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-4.0])]),
        group(
            1, 2, old_logprobs=[torch.tensor([-5.0, -6.0])], completion_masks=[torch.tensor([0, 1])]
        ),
    ]
    (parts,) = pack(groups, None, 100, sharing="off").rows
    row = collate(groups, parts, [4, 1], CPU)
    by_member = {member: part.tolist() for member, part in row.split(row.old_logprobs)}
    assert by_member == {(0, 0): [-1, -2, -3], (0, 1): [-4], (1, 0): [-5, -6]}
    masks = {member: part.tolist() for member, part in row.split(row.mask)}
    assert masks == {(0, 0): [True] * 3, (0, 1): [True], (1, 0): [False, True]}
    assert row.ref_logprobs is None
    assert dict(zip(row.members, row.group_lengths.tolist(), strict=True))[(1, 0)] == 1


def test_rewards_become_advantages():
    made = group(1, 1, 1, advantages=None, rewards=[0.0, 1.0])
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert made.advantage_values() == pytest.approx([-half, half])


BAD = {
    "prompt": (lambda: group(0, 1), "prompt_ids is empty"),
    "neither": (lambda: group(1, 1, advantages=None), "either advantages or rewards"),
    "count": (lambda: group(1, 1, 1, advantages=[1.0]), "advantages has 1 entries, expected 2"),
    "tokens": (
        lambda: group(1, 2, old_logprobs=[torch.zeros(3)]),
        r"old_logprobs\[0\] has 3 entries for 2 tokens",
    ),
    "padded": (
        lambda: Group(prompt_ids=torch.zeros(2, 3), completion_ids=[[1]], advantages=[1.0]),
        r"prompt_ids has shape \(2, 3\), expected token ids in a row",
    ),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD.keys())
def test_bad_group_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_some_groups_with_old_logprobs_and_some_without():
    groups = [group(1, 1), group(1, 1, old_logprobs=[torch.zeros(1)])]
    (parts,) = pack(groups, None, 100).rows
    with pytest.raises(InputError, match="given for some groups and not for others"):
        collate(groups, parts, [1, 1], CPU)


# Cases C4 and C6 to C8 of the fault catalogue.


def test_c4_padding_of_prompts_is_taken_off_and_shifts_no_position():
    ids = torch.tensor([[0, 0, 5, 6], [0, 0, 5, 6], [7, 8, 9, 0], [7, 8, 9, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]])
    completions = [[11, 12], [13], [14, 15], [16]]
    options = {"group_size": 2, "rewards": [1.0, 0.0, 0.0, 1.0]}
    padded = make_groups(ids, completions, prompt_masks=mask, **options)
    plain = make_groups([[5, 6]] * 2 + [[7, 8, 9]] * 2, completions, **options)
    rows = []
    for groups in (padded, plain):
        (parts,) = pack(groups, None, 100).rows
        rows.append(collate(groups, parts, [1, 1], CPU))
    assert torch.equal(rows[0].input_ids, rows[1].input_ids)
    assert torch.equal(rows[0].position_ids, rows[1].position_ids)
    for wrong in ([1, 0, 1, 1], [0, 0, 0, 0], [1, 1]):
        with pytest.raises(InputError, match=r"prompt_masks\[0\] has .*tokens without a gap"):
            make_groups(
                [[5, 6, 7, 8]] * 2,
                [[1], [2]],
                prompt_masks=[wrong] * 2,
                **options | {"rewards": [0.0, 1.0]},
            )
    with pytest.raises(InputError, match="prompt_masks has 1 entries for 4 completions"):
        make_groups(ids, completions, prompt_masks=mask[:1], **options)


def test_c6_a_sequence_above_the_budget_is_refused_and_never_cut():
    with pytest.raises(
        ConfigError, match="token_budget = 8 is below the longest sequence, 10.*raise"
    ):
        pack([group(3, 1, 7)], None, 8)
    assert pack([group(3, 1, 7)], None, 10).tokens == 9


def test_c7_a_group_of_different_prompts_is_found():
    prompts = [[1, 2, 3], [1, 2, 3], [1, 2, 4], [1, 2, 3]]
    completions = [[5], [6], [7], [8, 9]]
    with pytest.raises(InputError, match=r"prompt_ids\[2\] is another prompt than prompt_ids\[0\]"):
        make_groups(prompts, completions, group_size=4, rewards=[1, 0, 0, 1])
    prompts[2] = [1, 2, 3]
    (made,) = make_groups(prompts, completions, group_size=4, rewards=[1, 0, 0, 1])
    assert made.prompt_ids == [1, 2, 3]
    assert made.completion_ids == completions
    first, second = make_groups(
        [[1], [1], [2], [2]],
        completions,
        group_size=2,
        advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]),
        sampler_logprobs=[torch.zeros(len(c)) for c in completions],
    )
    assert second.advantage_values() == [0.5, -0.5]
    assert len(first.sampler_logprobs) == 2
    with pytest.raises(InputError, match="4 completions are no multiple of group_size = 3"):
        make_groups([[1]] * 4, completions, group_size=3, rewards=[0.0] * 4)


@pytest.mark.parametrize("budget", [0, -5, 2.5, True])
def test_c8_a_budget_is_a_positive_whole_number(budget):
    with pytest.raises(ConfigError, match="token_budget = .*expected a positive whole number"):
        pack([group(1, 1)], None, budget)


def test_c8_one_giant_sequence_and_ten_thousand_tiny_ones():
    tiny = [group(1, *[2] * 100) for _ in range(100)]
    packing = pack([group(500, 3500), *tiny], None, 4000)
    assert len(placed(packing)) == 10_001
    assert max(sum(p.tokens for p in row) for row in packing.rows) <= 4000
    assert len(packing.rows) == -(-packing.tokens // 4000)
