"""One optimizer step over groups: equal to a plain per-sequence loop, however it is cut into
micro-batches."""

import dataclasses

import pytest
import torch

from grpo_fast import ConfigError, LossConfig, reference
from grpo_fast.groups import Group
from grpo_fast.step import group_logprobs, grpo_backward
from grpo_fast.tiny import tiny_model

VOCABULARY = 50


def make_groups(seed: int = 0) -> list[Group]:
    """Three ragged groups, one completion of one token, one masked in part."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    shapes = [(4, (3, 1, 6)), (7, (2, 5)), (2, (4, 4, 2, 3))]
    groups = []
    for prompt, lengths in shapes:
        completions = [ids(length) for length in lengths]
        masks = [[1] * len(c) for c in completions]
        masks[-1][0] = 0
        groups.append(
            Group(
                prompt_ids=ids(prompt),
                completion_ids=completions,
                advantages=torch.randn(len(lengths), generator=generator),
                completion_masks=masks,
            )
        )
    return groups


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_model().double().eval()


def loop_logprobs(model, group: Group, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward for one sequence: its logits and log-probs, with gradient."""
    prompt, completion = list(group.prompt_ids), list(group.completion_ids[k])
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    targets = torch.tensor(completion)
    return logits, reference.token_logprob(logits, targets).logp


def with_policies(model, groups: list[Group]) -> list[Group]:
    torch.manual_seed(1)
    made = []
    for group in groups:
        own = [loop_logprobs(model, group, k)[1].detach() for k in range(len(group.completion_ids))]
        made.append(
            dataclasses.replace(
                group,
                old_logprobs=[x + 0.2 * torch.randn_like(x) for x in own],
                ref_logprobs=[x + 0.2 * torch.randn_like(x) for x in own],
            )
        )
    return made


def loop_loss(model, groups: list[Group], config: LossConfig) -> torch.Tensor:
    """The definition: every sequence by itself, then one weighted sum."""
    pieces, lengths = [], []
    for group in groups:
        for k, completion in enumerate(group.completion_ids):
            logits, _ = loop_logprobs(model, group, k)
            pieces.append((logits, group, k))
            lengths.append(len(completion))

    def cat(values):
        return torch.cat([torch.as_tensor(v).double() for v in values])

    return reference.grpo_loss(
        torch.cat([logits for logits, _, _ in pieces]),
        cat(group.completion_ids[k] for _, group, k in pieces).long(),
        cat([group.advantages[k]] * len(group.completion_ids[k]) for _, group, k in pieces),
        mask=cat(group.completion_masks[k] for _, group, k in pieces).bool(),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        old_logp=cat(group.old_logprobs[k].float() for _, group, k in pieces),
        ref_logp=cat(group.ref_logprobs[k].float() for _, group, k in pieces),
        config=config,
    ).loss.sum()


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_equals_a_loop_over_sequences_under_any_budget(model, loss_type, level):
    config = LossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.1,
        max_completion_length=6,
    )
    groups = with_policies(model, make_groups())
    expected = loop_loss(model, groups, config)
    expected.backward()
    truth = {name: p.grad.clone() for name, p in model.named_parameters()}
    for budget in (12, 30, 1000):
        model.zero_grad()
        output = grpo_backward(model, groups, loss=config, token_budget=budget)
        assert float(output.loss) == pytest.approx(float(expected), rel=1e-6)
        for name, parameter in model.named_parameters():
            error = (parameter.grad - truth[name]).norm() / truth[name].norm()
            assert error < 1e-6, f"{name} at budget {budget}: {error:.1e}"


def test_logprobs_come_back_in_group_order(model):
    groups = make_groups()
    output = grpo_backward(model, groups, token_budget=12)
    expected = [
        loop_logprobs(model, group, k)[1]
        for group in groups
        for k in range(len(group.completion_ids))
    ]
    masks = [torch.tensor(mask) for group in groups for mask in group.completion_masks]
    for found, want, mask in zip(output.logprobs, expected, masks, strict=True):
        assert torch.allclose(found.double(), want * mask, atol=1e-6)
    for found, want in zip(group_logprobs(model, groups, token_budget=12), expected, strict=True):
        assert torch.allclose(found.double(), want, atol=1e-6)


def test_group_logprobs_at_a_temperature_without_gradient(model):
    groups = make_groups()
    found = group_logprobs(model, groups, temperature=0.5)
    logits, _ = loop_logprobs(model, groups[0], 0)
    want = reference.token_logprob(
        logits, torch.tensor(groups[0].completion_ids[0]), temperature=0.5
    ).logp
    assert torch.allclose(found[0].double(), want, atol=1e-6)
    assert not found[0].requires_grad


def test_metrics_are_token_weighted_over_micro_batches(model):
    groups = with_policies(model, make_groups())
    config = LossConfig(beta=0.1)
    whole = grpo_backward(model, groups, loss=config, token_budget=1000).metrics
    parts = grpo_backward(model, groups, loss=config, token_budget=12).metrics
    assert set(whole) == set(parts)
    cut = {name for name in whole if name.startswith("batch/")}
    assert float(parts["batch/microbatches_per_step"]) > 1
    for name in whole.keys() - cut:
        assert float(parts[name]) == pytest.approx(float(whole[name]), rel=1e-5), name


@pytest.mark.parametrize("options", [{"share_prompts": "off"}, {"chunking": "on"}, {}])
def test_changing_one_completion_moves_no_bit_of_another(options):
    torch.manual_seed(0)
    model = tiny_model().eval()
    groups = make_groups()
    options = {"share_prompts": "on", "token_budget": 64} | options
    before = group_logprobs(model, groups, **options)
    ids = [list(completion) for completion in groups[0].completion_ids]
    ids[0] = [(token + 1) % VOCABULARY for token in ids[0]]
    moved = [dataclasses.replace(groups[0], completion_ids=ids), *groups[1:]]
    after = group_logprobs(model, moved, **options)
    assert not torch.equal(before[0], after[0])
    for one, other in zip(before[1:], after[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{"share_prompts": "off"}, {"chunking": "on"}, {}])
def test_order_of_groups_and_completions_does_not_matter(model, options):
    options = {"share_prompts": "on", "token_budget": 30} | options
    groups = make_groups()
    grpo_backward(model, groups, **options)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    turned = [
        dataclasses.replace(
            group,
            completion_ids=group.completion_ids[::-1],
            advantages=group.advantages.flip(0),
            completion_masks=group.completion_masks[::-1],
        )
        for group in groups[::-1]
    ]
    grpo_backward(model, turned, **options)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-6, f"{name}: {error:.1e}"


def test_a_step_that_teaches_nothing_forwards_nothing(model):
    groups = [dataclasses.replace(g, advantages=0 * g.advantages) for g in make_groups()]
    output = grpo_backward(model, groups)
    assert float(output.loss) == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(part.isnan().all() for part in output.logprobs)
    assert float(output.metrics["groups/dead_frac"]) == 1
    assert float(output.metrics["batch/forwarded_tokens_per_step"]) == 0
    assert output.metrics["n_tokens"] == output.metrics["n_tokens_skipped"]
    assert "entropy" not in output.metrics


def test_dead_groups_stay_in_the_normaliser(model):
    live, dead = make_groups()[0], make_groups()[1]
    dead = dataclasses.replace(dead, advantages=0 * dead.advantages)
    for options in ({}, {"skip_zero_advantage": False}):
        model.zero_grad()
        output = grpo_backward(model, [live, dead], loss=LossConfig(**options))
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        if not options:
            first, tokens = found, output.metrics["batch/forwarded_tokens_per_step"]
            assert float(output.metrics["groups/dead_frac"]) == 0.5
    assert float(output.metrics["batch/forwarded_tokens_per_step"]) > float(tokens)
    for name, truth in found.items():
        assert (first[name] - truth).norm() <= 1e-6 * truth.norm(), name


def test_c2_a_completion_of_one_token_needs_no_row_of_its_own(model):
    group = Group(prompt_ids=[5, 6, 7], completion_ids=[[4], [9], [3]], rewards=[1.0, 0.0, 0.0])
    for options in ({}, {"chunking": "on"}):
        found = group_logprobs(model, [group], share_prompts="on", **options)
        for k, part in enumerate(found):
            want = loop_logprobs(model, group, k)[1]
            assert torch.allclose(part.double(), want, atol=1e-6)
        output = grpo_backward(model, [group], share_prompts="on", **options)
        assert float(output.metrics["batch/forwarded_tokens_per_step"]) == 3


@pytest.mark.parametrize("share", ["on", "off"])
def test_c2_an_empty_completion_adds_nothing_and_moves_no_bit_of_its_neighbours(model, share):
    whole = dataclasses.replace(make_groups()[0], completion_masks=None)
    completions = [whole.completion_ids[0], [], *whole.completion_ids[1:]]
    advantages = torch.cat([whole.advantages[:1], torch.tensor([9.0]), whole.advantages[1:]])
    gap = dataclasses.replace(whole, completion_ids=completions, advantages=advantages)
    found = []
    for group in (whole, gap):
        model.zero_grad()
        output = grpo_backward(model, [group], share_prompts=share)
        found.append((output, [p.grad.clone() for p in model.parameters()]))
    (without, gradients), (with_gap, same) = found
    assert without.loss == with_gap.loss
    assert with_gap.logprobs[1].shape == (0,)
    assert float(with_gap.metrics["batch/dropped_masked"]) == 1
    for one, other in zip(
        without.logprobs, with_gap.logprobs[:1] + with_gap.logprobs[2:], strict=True
    ):
        assert torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def test_c3_packed_padded_and_one_by_one_give_the_same_logprobs():
    torch.manual_seed(0)
    model, groups = tiny_model().eval(), make_groups()
    alone = [
        loop_logprobs(model, group, k)[1].detach()
        for group in groups
        for k in range(len(group.completion_ids))
    ]
    rows = [[*g.prompt_ids, *c] for g in groups for c in g.completion_ids]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    starts = [len(g.prompt_ids) for g in groups for _ in g.completion_ids]
    packed = group_logprobs(model, groups, share_prompts="off", token_budget=30)
    shared = group_logprobs(model, groups, share_prompts="on")
    for i, expected in enumerate(alone):
        start, row = starts[i], torch.tensor(rows[i])
        padded = reference.token_logprob(logits[i, start - 1 : len(row) - 1], row[start:]).logp
        for found in (padded, packed[i], shared[i]):
            assert torch.allclose(found.float(), expected.float(), atol=1e-5)


def test_c5_a_backend_that_ignores_the_segments_is_found(model, monkeypatch):
    from grpo_fast.attention_backends import CPUFlash
    from grpo_fast.layout import Spans

    forward = CPUFlash.forward

    def leaking(self, q, k, v, spans, scoring):
        whole = Spans.of([q.shape[1]], [k.shape[1]], q.device)
        return forward(self, q, k, v, whole, scoring)

    monkeypatch.setattr(CPUFlash, "forward", leaking)
    with pytest.raises(ConfigError, match="attention 'auto'.* other hidden states"):
        grpo_backward(model, make_groups(), share_prompts="off")


def test_a_backend_that_leaks_a_little_is_found(model, monkeypatch):
    from grpo_fast.attention_backends import CPUFlash

    forward = CPUFlash.forward

    def leaking(self, q, k, v, spans, scoring):
        out, lse = forward(self, q, k, v, spans, scoring)
        return out + 1e-9 * v.sum(), lse  # far below what values alone could tell

    monkeypatch.setattr(CPUFlash, "forward", leaking)
    with pytest.raises(ConfigError, match="completion 1 changes when completion 0 does"):
        grpo_backward(model, make_groups(), share_prompts="off")


def test_layers_that_mix_tokens_themselves_are_refused(model):
    layer = model.model.layers[0].self_attn
    forward = layer.forward

    def own(*args, grpo_layout=None, **kwargs):
        if grpo_layout is None:
            return forward(*args, **kwargs)
        hidden = kwargs["hidden_states"]
        return hidden.cumsum(1), None

    layer.forward = own
    with pytest.raises(ConfigError, match="1 of the 2 layers of Qwen3ForCausalLM"):
        grpo_backward(model, make_groups())


def test_attention_dropout_is_refused():
    model = tiny_model(attention_dropout=0.1).train()
    with pytest.raises(ConfigError, match="drops attention weights"):
        grpo_backward(model, make_groups())


def test_the_attention_of_the_model_is_put_back(model):
    before = model.config._attn_implementation
    grpo_backward(model, make_groups())
    assert model.config._attn_implementation == before
    with pytest.raises(ConfigError):
        grpo_backward(model, make_groups(), attention="flash")
    assert model.config._attn_implementation == before


def test_nothing_is_left_out_where_that_is_switched_off(model):
    groups = make_groups()
    masks = [
        [0] * len(c) if k == 0 else m
        for k, (c, m) in enumerate(
            zip(groups[0].completion_ids, groups[0].completion_masks, strict=True)
        )
    ]
    groups[0] = dataclasses.replace(groups[0], completion_masks=masks)
    groups[1] = dataclasses.replace(groups[1], advantages=0 * groups[1].advantages)
    found = {}
    for skip in (True, False):
        model.zero_grad()
        output = grpo_backward(
            model, groups, loss=LossConfig(skip_zero_advantage=skip), share_prompts="off"
        )
        found[skip] = output, [p.grad.clone() for p in model.parameters()]
    (left_out, gradients), (whole, same) = found[True], found[False]
    assert float(left_out.metrics["batch/dropped_masked"]) == 1
    assert float(left_out.metrics["batch/dropped_zero_advantage"]) == 2
    assert float(whole.metrics["batch/dropped_masked"]) == 0
    assert float(whole.metrics["batch/dropped_zero_advantage"]) == 0
    everything = sum(len(g.prompt_ids) + len(c) - 1 for g in groups for c in g.completion_ids)
    assert float(whole.metrics["batch/forwarded_tokens_per_step"]) == everything
    for a, b in zip(gradients, same, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
