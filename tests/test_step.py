"""One optimizer step over groups: equal to a plain per-sequence loop, however it is cut into
micro-batches."""

import dataclasses

import pytest
import torch

from grpo_fast import LossConfig, reference
from grpo_fast.packing import Group
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
    for name in whole:
        assert float(parts[name]) == pytest.approx(float(whole[name]), rel=1e-5), name
