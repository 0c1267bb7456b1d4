"""The oracle on whole batches: weights of tokens, gradcheck, masks, NaN, micro-batches."""

import pytest
import torch
from by_hand import INF, NAN, near

from grpo_fast import LossConfig, reference
from grpo_fast.testing import random_rows, random_sequences

pytestmark = pytest.mark.usefixtures("one_thread")


def double(rows: dict) -> dict:
    return {k: v.double() if v.is_floating_point() else v for k, v in rows.items()}


MASK = [1, 1, 0, 1, 0, 0, 0, 0, 1]
WEIGHTS = {
    # lengths 3, 2, 3, 1 with 2, 1, 0, 1 live; groups 5 5 8 9
    "sequence_mean": [1 / 8, 1 / 8, 0, 1 / 4, 0, 0, 0, 0, 1 / 4],
    "token_mean": [1 / 4, 1 / 4, 0, 1 / 4, 0, 0, 0, 0, 1 / 4],
    "constant": [1 / 40, 1 / 40, 0, 1 / 40, 0, 0, 0, 0, 1 / 40],
    "sequence_sum": [1 / 4, 1 / 4, 0, 1 / 4, 0, 0, 0, 0, 1 / 4],
    # three groups with 3, 0 and 1 live tokens
    "prompt_mean": [1 / 9, 1 / 9, 0, 1 / 9, 0, 0, 0, 0, 1 / 3],
}
NORMALISERS = {
    "sequence_mean": 4,
    "token_mean": 4,
    "constant": 40,
    "sequence_sum": 4,
    "prompt_mean": 3,
}


@pytest.mark.parametrize("aggregation", WEIGHTS)
def test_token_weights_by_hand(aggregation):
    mask = torch.tensor(MASK, dtype=torch.bool)
    cu, groups = torch.tensor([0, 3, 5, 8, 9]), torch.tensor([5, 5, 8, 9])
    config = LossConfig(aggregation=aggregation, max_completion_length=10)
    found = reference.token_weights(mask, cu, config, group_ids=groups)
    assert found.tolist() == near(WEIGHTS[aggregation])
    found = reference.token_weights(mask, cu, config, 2.0, groups)
    assert found.tolist() == near([w * NORMALISERS[aggregation] / 2 for w in WEIGHTS[aggregation]])


def test_default_aggregations():
    mask = torch.tensor(MASK, dtype=torch.bool)
    cu = torch.tensor([0, 3, 5, 8, 9])
    for loss_type, aggregation in {
        "grpo": "sequence_mean",
        "dapo": "token_mean",
        "dr_grpo": "constant",
        "luspo": "sequence_sum",
    }.items():
        config = LossConfig(loss_type=loss_type, max_completion_length=10)
        assert reference.token_weights(mask, cu, config).tolist() == near(WEIGHTS[aggregation])


def test_nothing_live_weighs_nothing():
    for cu in ([0], [0, 0], [0, 2]):
        mask = torch.zeros(cu[-1], dtype=torch.bool)
        for aggregation in WEIGHTS:
            config = LossConfig(aggregation=aggregation, max_completion_length=10)
            groups = torch.zeros(len(cu) - 1, dtype=torch.long)
            found = reference.token_weights(mask, torch.tensor(cu), config, group_ids=groups)
            assert found.tolist() == [0] * cu[-1]


# Each of them acts on some tokens of random_sequences and not on others.
BATCH_OPTIONS = {
    "importance_sampling_correction": "token_truncate",
    "off_policy_mask_threshold": 0.0,
    "top_entropy_quantile": 0.7,
    "entropy_coef": 0.05,
}
LOSS_TYPES = {
    "grpo": {"delta": 1.5},
    "bnpo": {"dual_clip": 1.3},
    "dapo": {},
    "dr_grpo": {},
    "cispo": {"epsilon_high": 1.1},
    "sapo": {},
    "gspo": {},
    "luspo": {},
    "gmpo": {},
    "vespo": {},
    "dppo_tv": {"epsilon": 0.05},
    "dppo_kl": {"epsilon": 0.01},
    "dro": {"dro_beta": 0.5},
    "gpg": {},
    "reinforce": {},
}


def config_of(loss_type: str, **options) -> LossConfig:
    return LossConfig(
        loss_type=loss_type, **{"max_completion_length": 9} | LOSS_TYPES[loss_type] | options
    )


def batch_loss(batch: dict, config: LossConfig, logits: torch.Tensor, **options):
    """reference.grpo_loss of a padded batch of `random_sequences`."""
    length = batch["targets"].shape[1]

    def flat(name: str) -> torch.Tensor:
        return batch[name].reshape(-1)

    return reference.grpo_loss(
        logits,
        flat("targets"),
        batch["advantages"].repeat_interleave(length),
        mask=flat("mask"),
        cu_seqlens=torch.arange(len(batch["targets"]) + 1) * length,
        old_logp=flat("old_logprobs"),
        ref_logp=flat("ref_logprobs"),
        sampler_logp=flat("sampler_logprobs"),
        group_ids=batch["group_ids"],
        config=config,
        **options,
    )


def logits_of(batch: dict) -> torch.Tensor:
    return (batch["hidden"] @ batch["weight"].T).flatten(0, 1)


LEVELLED = ("grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo", "sapo")
# The others hold a factor constant; they are above, by hand.
SMOOTH = [(loss_type, level) for loss_type in LEVELLED for level in ("token", "sequence")]
SMOOTH += [(loss_type, None) for loss_type in ("gmpo", "dro", "gpg", "reinforce")]


@pytest.mark.parametrize("loss_type, level", SMOOTH)
def test_gradcheck(loss_type, level):
    batch = double(random_sequences(4, 4, 3, 6, seed=1))
    for beta, kl, corrected in ((0.0, "k3", False), (0.3, "k3", True), (0.3, "abs", False)):
        config = config_of(
            loss_type,
            importance_sampling_level=level,
            beta=beta,
            kl_estimator=kl,
            use_bias_correction_kl=corrected,
            **BATCH_OPTIONS,
        )
        logits = logits_of(batch).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, config=config: batch_loss(batch, config, x, temperature=0.8).loss,
            (logits,),
            fast_mode=True,
        )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprob_gradcheck(temperature):
    rows = double(random_rows(4, 7))
    logits = rows["logits"].requires_grad_()

    def outputs(x):
        return tuple(reference.token_logprob(x, rows["targets"], temperature=temperature))

    assert torch.autograd.gradcheck(outputs, (logits,), eps=1e-6, atol=1e-7)


TOKEN_OBJECTIVES = {
    "clip": {"low": 0.8, "high": 1.2, "cap": 1.5, "dual_clip": 1.4},
    "cispo": {"high": 1.1},
    "sapo": {"low": 1.05, "high": 1.0},
    "dppo_tv": {"low": 0.05, "high": 0.05, "cap": 20.0},
    "dppo_kl": {"low": 0.01, "high": 0.01, "cap": 20.0},
    "dro": {"low": 0.5},
    "reinforce": {},
}


@pytest.mark.parametrize("objective", TOKEN_OBJECTIVES)
def test_policy_loss_is_policy_rows_with_its_numbers(objective):
    batch = double(random_sequences(4, 4, 3, 6))
    logits = logits_of(batch)
    types = {"clip": "grpo", "reinforce": "gpg"}
    options = {
        "clip": {"delta": 1.5, "dual_clip": 1.4},
        "dppo_tv": {"epsilon": 0.05},
        "dppo_kl": {"epsilon": 0.01},
    }
    config = config_of(
        types.get(objective, objective),
        aggregation="token_mean",
        beta=0.3,
        kl_estimator="k2",
        use_bias_correction_kl=True,
        entropy_coef=0.1,
        **options.get(objective, {"delta": None}),
    )
    expected = batch_loss(batch, config, logits, temperature=0.8)
    live = batch["mask"].reshape(-1)
    found = reference.policy_loss(
        logits,
        batch["targets"].reshape(-1),
        batch["advantages"].repeat_interleave(4),
        live.double() / live.sum(),
        old_logp=batch["old_logprobs"].reshape(-1),
        ref_logp=batch["ref_logprobs"].reshape(-1),
        policy_weights=torch.ones(16, dtype=torch.float64),
        entropy_weights=0.1 * live.double() / live.sum(),
        temperature=0.8,
        objective=objective,
        beta=0.3,
        kl_estimator="k2",
        bias_corrected_kl=True,
        **TOKEN_OBJECTIVES[objective],
    )
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15), name


def results_of(batch: dict, config: LossConfig, **options) -> list[torch.Tensor]:
    """Every field of the rows, and the gradient of the logits."""
    logits = logits_of(batch).requires_grad_()
    rows = batch_loss(batch, config, logits, **options)
    return [*rows, *torch.autograd.grad(rows.loss.sum(), logits)]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_lies_under_the_mask_changes_no_bit(loss_type):
    batch = double(random_sequences(4, 5, 3, 6))
    config = config_of(loss_type, beta=0.2, **BATCH_OPTIONS)
    hole = ~batch["mask"]
    seen = []
    for garbage in (0.0, NAN, INF, -INF):
        dirty = {name: value.clone() for name, value in batch.items()}
        for name in ("hidden", "old_logprobs", "ref_logprobs", "sampler_logprobs"):
            dirty[name][hole] = garbage
        dirty["targets"][hole] = 10**6 if garbage else -100
        temperature = torch.full(hole.shape, 0.8, dtype=torch.float64)
        temperature[hole] = garbage
        seen.append(results_of(dirty, config, temperature=temperature.reshape(-1)))
    for value in seen[0]:
        assert not value[hole.reshape(-1)].any()
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nan_in_a_live_row_surfaces(loss_type):
    batch = double(random_sequences(4, 5, 3, 6))
    row = tuple(batch["mask"].nonzero()[0].tolist())
    batch["hidden"][row] = NAN
    *_, mass, gradient = results_of(batch, config_of(loss_type, beta=0.2, **BATCH_OPTIONS))
    flat = row[0] * 5 + row[1]
    assert mass[flat].isnan()
    assert gradient[flat].isnan().all()


@pytest.mark.parametrize("aggregation", WEIGHTS)
def test_micro_batches_add_up(aggregation):
    batch = double(random_sequences(6, 4, 3, 6))
    tokens, groups = int(batch["mask"].sum()), len(batch["group_ids"].unique())
    normaliser = {"token_mean": tokens, "constant": 6 * 9, "prompt_mean": groups}
    denominators = {
        "denominator": normaliser.get(aggregation, 6),
        "entropy_denominator": tokens,
    }
    for loss_type in LOSS_TYPES:
        # The quantile is one of its call.
        options = BATCH_OPTIONS | {"top_entropy_quantile": 1.0}
        config = config_of(loss_type, aggregation=aggregation, beta=0.2, **options)
        whole = results_of(batch, config)
        parts = []
        for cut in (slice(0, 2), slice(2, 6)):
            part = {name: x if name == "weight" else x[cut] for name, x in batch.items()}
            parts.append(results_of(part, config, **denominators))
        for a, *b in zip(whole, *parts, strict=True):
            assert torch.allclose(a, torch.cat(b), rtol=1e-12, atol=1e-15), loss_type
