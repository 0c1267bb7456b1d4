"""What a step says of each token is what the float64 oracle says, however the step is cut."""

import dataclasses

import pytest
import torch

from grpo_fast import Group, LossConfig, reference
from grpo_fast.step import group_logprobs, grpo_backward
from grpo_fast.tiny import tiny_model

VOCABULARY = 50
CUTS = {
    "whole": {"token_budget": 1000},
    "rows": {"token_budget": 24, "share_prompts": "off"},
    "shared": {"token_budget": 40, "share_prompts": "on"},
    "chunks": {"token_budget": 24, "share_prompts": "on", "chunking": "on"},
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_model().eval()


def groups_of(model, *, policies: bool, seed: int = 0) -> list[Group]:
    """Ragged groups with a completion of one token, one masked in part and a group without a
    spread; old and reference log-probs around the model's own."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    groups = []
    for prompt, lengths in [(4, (3, 1, 6)), (7, (2, 5)), (9, (4, 4, 2, 3))]:
        completions = [ids(length) for length in lengths]
        masks = [[1] * length for length in lengths]
        masks[-1][0] = 0
        advantages = torch.randn(len(lengths), generator=generator)
        groups.append(
            Group(
                prompt_ids=ids(prompt),
                completion_ids=completions,
                advantages=0 * advantages if prompt == 7 else advantages,
                completion_masks=masks,
            )
        )
    if not policies:
        return groups

    def near(values):
        return [x + 0.3 * torch.randn(len(x), generator=generator) for x in values]

    own = group_logprobs(model, groups)
    changed, at = [], 0
    for group in groups:
        part = own[at : at + len(group.completion_ids)]
        at += len(part)
        known = {"old_logprobs": near(part), "ref_logprobs": near(part)}
        changed.append(dataclasses.replace(group, **known))
    return changed


def oracle(model, groups: list[Group], config: LossConfig):
    """PolicyRows of every token, each sequence by itself through a float64 model."""
    exact = tiny_model().double().eval()
    exact.load_state_dict(model.state_dict())
    parts = [(g, group, k) for g, group in enumerate(groups) for k in range(len(group.advantages))]
    logits = []
    for _, group, k in parts:
        ids = torch.tensor([[*group.prompt_ids, *group.completion_ids[k]]])
        logits.append(exact(ids).logits[0, len(group.prompt_ids) - 1 : -1].detach())

    def cat(name):
        values = [getattr(group, name) for _, group, _ in parts]
        if values[0] is None:
            return None
        return torch.cat(
            [torch.as_tensor(v[k]) for v, (_, _, k) in zip(values, parts, strict=True)]
        )

    lengths = [len(rows) for rows in logits]
    advantages = torch.tensor([float(group.advantages[k]) for _, group, k in parts])
    old, ref = cat("old_logprobs"), cat("ref_logprobs")
    rows = reference.grpo_loss(
        torch.cat(logits),
        cat("completion_ids"),
        advantages.double().repeat_interleave(torch.tensor(lengths)),
        mask=cat("completion_masks").bool(),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        group_ids=torch.tensor([g for g, _, _ in parts]),
        old_logp=None if old is None else old.double(),
        ref_logp=None if ref is None else ref.double(),
        config=config,
    )
    return {
        name: None if value is None else value.split(lengths)
        for name, value in rows._asdict().items()
    }


CONFIGS = {
    "on policy": (LossConfig(), False),
    "clip": (LossConfig(), True),
    "kl": (LossConfig(beta=0.1), True),
    "sequence": (LossConfig(loss_type="gspo", beta=0.1), True),
    "prompt mean": (LossConfig(aggregation="prompt_mean"), True),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_token_is_the_oracle_s(model, name, cut):
    config, policies = CONFIGS[name]
    groups = groups_of(model, policies=policies)
    output = grpo_backward(model, groups, loss=config, **CUTS[cut])
    truth = oracle(model, groups, config)
    masks = [torch.tensor(mask).bool() for group in groups for mask in group.completion_masks]
    dead = [not a and not config.beta for group in groups for a in group.advantages.tolist()]
    made = {"ratio": "ratio", "gradient_mass": "mass", "slope": "slope"}
    made |= {"kl": "kl"} if policies else {}
    assert (output.tokens.kl is None) == (not policies)
    for ours, theirs in made.items():
        found = getattr(output.tokens, ours).split(output.tokens.lengths)
        for k, (value, exact) in enumerate(zip(found, truth[theirs], strict=True)):
            if dead[k] and ours == "slope":
                assert (value == 0).all(), f"completion {k} teaches nothing"
                continue
            if dead[k]:
                assert value.isnan().all(), f"{ours} of completion {k} was not forwarded"
                continue
            assert (value[~masks[k]] == 0).all()
            # Float32 forwards of this model are 1e-6 from the float64 one.
            error = (value - exact)[masks[k]].abs().max()
            assert error <= 2e-5 * max(1, float(exact.abs().max())), f"{ours} {k}: {error:.1e}"
    assert sum(row < 0 for row in output.tokens.rows) == sum(dead)
    assert len(set(output.tokens.rows) - {-1}) == output.metrics["batch/microbatches_per_step"]


def test_four_fields_are_unpacked_as_ever(model):
    loss, logprobs, entropy, metrics = output = grpo_backward(
        model, groups_of(model, policies=False)
    )
    assert loss is output.loss
    assert metrics is output.metrics
    assert len(logprobs) == len(entropy) == len(output.tokens.lengths) == 9
    for parts, whole in ((logprobs, output.tokens.logprobs), (entropy, output.tokens.entropy)):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0, equal_nan=True)


def test_no_token_keeps_a_graph(model):
    output = grpo_backward(
        model, groups_of(model, policies=True), loss=LossConfig(beta=0.1), token_budget=24
    )
    for values in (output.tokens.ratio, output.tokens.kl, output.tokens.gradient_mass):
        assert all(value.grad_fn is None and not value.requires_grad for value in values)
