"""Every loss a LossConfig can ask for, from the public functions, against the float64 oracle.

One grid: objective x KL x correction for the sampler, in which level, aggregation, masks, entropy
bonus, old log-probs, temperature, head, layout and denominators take turns. Then what must hold
for any of them. Shapes: `S` sequences, `L` padded length, `T` packed tokens, `D` hidden, `V`
vocabulary.
"""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from grpo_fast import InputError, LossConfig, chunked, grpo_loss, linear_grpo_loss, reference
from grpo_fast.testing import assert_close_to_oracle, random_sequences

pytestmark = pytest.mark.usefixtures("one_thread")
S, L, D, V = 5, 6, 7, 37
SMALL = (3, 4, 5, 37)  # for the interpreter
FLOAT64, FLOAT32, BFLOAT16 = torch.float64, torch.float32, torch.bfloat16


def own_objective(tokens, config):
    """A user's, with slopes in log-probs, ratio and entropy."""
    clipped = tokens.ratio.clamp(max=1 + config.clip_high) * tokens.advantages
    drift = tokens.logprobs - tokens.old_logprobs
    return drift.square() - clipped + 0.1 * tokens.entropy * tokens.logprobs


def own_of_sequences(tokens, config):
    """The same with sums and means over the sequence."""
    clipped = tokens.ratio.clamp(max=1 + config.clip_high) * tokens.advantages
    drift = tokens.sequence_mean(tokens.logprobs - tokens.old_logprobs)
    return drift.square() - clipped + 0.1 * tokens.entropy * tokens.sequence_sum(tokens.logprobs)


OBJECTIVES = {
    "clip": {"epsilon": 0.1, "epsilon_high": 0.2},
    "delta": {"epsilon": 0.1, "epsilon_high": 0.2, "delta": 1.3},
    "dual clip": {"epsilon": 0.1, "epsilon_high": 0.2, "dual_clip": 1.2},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "cispo, both bounds": {"loss_type": "cispo", "epsilon_high": 0.1, "cispo_bounds": "both"},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 1.3},
    "gmpo": {"loss_type": "gmpo", "epsilon": 0.1},
    "vespo": {"loss_type": "vespo", "vespo_k_pos": 1.1, "vespo_lambda_neg": 1.7},
    "dppo_tv": {"loss_type": "dppo_tv", "epsilon": 0.05, "epsilon_high": 0.1, "delta": 1.3},
    "dppo_kl": {"loss_type": "dppo_kl", "epsilon": 0.01, "epsilon_high": 0.02},
    "dro": {"loss_type": "dro", "dro_beta": 0.3},
    "reinforce": {"loss_type": "reinforce"},
    # Of the loss type nothing is left.
    "own": {"objective": own_objective, "loss_type": "vespo"},
    "own, of sequences": {"objective": own_of_sequences},
}
LEVELS = ("token", "sequence", "sequence_token")
LEVELLED = ("clip", "delta", "dual clip", "cispo", "cispo, both bounds", "sapo", "own")
OF_SEQUENCES = "own, of sequences"
AGGREGATIONS = ("sequence_mean", "token_mean", "constant", "sequence_sum", "prompt_mean")
KLS = [{}]
KLS += [{"beta": 0.3, "kl_estimator": k} for k in ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")]
KLS += [
    {"beta": 0.3, "kl_estimator": k, "use_bias_correction_kl": True} for k in ("k1", "k3", "abs+")
]
CORRECTIONS = [{}]
CORRECTIONS += [
    {
        "importance_sampling_correction": f"{scope}_{rule}",
        "importance_sampling_min": 0.8,
        "importance_sampling_max": 1.2,
    }
    for scope in ("token", "sequence", "geometric")
    for rule in ("truncate", "mask")
]
MASKS = {"off_policy_mask_threshold": 0.0, "top_entropy_quantile": 0.63, "entropy_coef": 0.05}
LOSS_TYPES = ["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "gspo", "luspo", "gmpo", "vespo"]
LOSS_TYPES += ["dppo_tv", "dppo_kl", "dro", "gpg", "reinforce"]


def config_of(objective: str, level: str, aggregation: str, *options: dict) -> LossConfig:
    merged = OBJECTIVES[objective] | {"aggregation": aggregation, "max_completion_length": 9}
    if objective in LEVELLED:
        merged["importance_sampling_level"] = level
    elif objective == OF_SEQUENCES:
        merged["importance_sampling_level"] = "sequence" if level == "token" else level
    for more in options:
        merged |= more
    return LossConfig(**merged)


def sequences(dtype: torch.dtype, device="cpu", *, shape=(S, L, D, V), seed: int = 3) -> dict:
    """Keywords of `linear_grpo_loss` for a padded batch, with all that may be left out."""
    batch = random_sequences(*shape, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    s, length, _, v = shape
    # One token is the shortest sequence that counts.
    batch["mask"][-1] &= batch["mask"][-1].cumsum(0) == 1

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=FLOAT64)

    more = {
        "bias": normal(v).to(dtype),
        "temperature": (0.5 + normal(s, length).sigmoid()).float(),
        "token_advantages": normal(s, length).float(),
        # Whole sequences have drifted too, so that bounds of their ratios act.
        "old_logprobs": (batch["old_logprobs"] + 0.4 * normal(s, 1).float()).clamp(max=0),
    }
    return {name: value.to(device) for name, value in (batch | more).items()}


def taking_turns(batch: dict, config: LossConfig, dice: random.Random) -> dict:
    """Keywords of one call: what the config needs, and the others now and then."""
    kept = ["hidden", "weight", "targets", "advantages", "mask"]
    kept += ["ref_logprobs"] if config.beta or dice.random() < 0.2 else []
    kept += ["old_logprobs"] if dice.random() < 0.7 else []
    if config.importance_sampling_correction != "none" or dice.random() < 0.3:
        kept.append("sampler_logprobs")
    kept += ["group_ids"] if config.adds_up == "prompt_mean" else []
    kwargs = {name: batch[name] for name in kept}
    if dice.random() < 0.3:
        kwargs["advantages"] = batch["token_advantages"]
    kwargs |= dice.choice([{}, {"temperature": 0.7}, {"temperature": batch["temperature"]}])
    if dice.random() < 0.4:
        kwargs |= {"bias": batch["bias"], "softcap": 4.0, "logit_scale": 0.8}
    return kwargs | dice.choice([{}, {"denominator": 3.5, "entropy_denominator": 11.0}])


def per_token(kwargs: dict, change) -> dict:
    """The keywords with `change` of those that have an entry a token."""
    shape = kwargs["targets"].shape
    return {
        name: change(value)
        if isinstance(value, torch.Tensor) and value.shape[:2] == shape
        else value
        for name, value in kwargs.items()
    }


def as_packed(kwargs: dict) -> dict:
    """The same call with packed tokens."""
    count, length = kwargs["targets"].shape
    offsets = torch.arange(count + 1, device=kwargs["targets"].device) * length
    return per_token(kwargs, lambda x: x.flatten(0, 1)) | {"cu_seqlens": offsets}


def oracle(kwargs: dict, config: LossConfig, dtype: torch.dtype = FLOAT64) -> dict:
    """reference.linear_grpo_loss in `dtype` of the keywords of a padded call: results by name,
    per-token ones flat, and the gradient of whatever could have one."""
    rows, length = dict(kwargs), kwargs["targets"].shape[1]
    if rows["advantages"].dim() == 1:
        rows["advantages"] = rows["advantages"].repeat_interleave(length)
    rows = as_packed(rows | {"advantages": rows["advantages"].view(-1, length)})
    for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs"):
        if name in rows:
            rows[name.removesuffix("robs")] = rows.pop(name)
    rows = {
        name: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in rows.items()
    }
    leaves = [name for name in ("logits", "hidden", "weight", "bias") if name in rows]
    for name in leaves:
        rows[name] = rows[name].detach().clone().requires_grad_()
    call = reference.grpo_loss if "logits" in rows else reference.linear_grpo_loss
    found = call(**rows, config=config)
    gradients = torch.autograd.grad(found.loss.sum(), [rows[name] for name in leaves])
    found = reference.PolicyRows(*(None if x is None else x.detach() for x in found))
    return {
        "loss": found.loss.sum(),
        "summed": found.loss.abs().sum(),
        "logprobs": found.logp,
        "entropy": found.entropy,
        "ratio": found.ratio,
        "gradient_mass": found.mass,
        "slope": found.slope,
        **({} if found.kl is None else {"kl": found.kl}),
        **dict(zip(leaves, gradients, strict=True)),
    }


def public(kwargs: dict, config: LossConfig, impl: str, *, packed: bool = False) -> dict:
    """The same from the public function, loss and gradients of 2 x loss halved."""
    kwargs = as_packed(kwargs) if packed else dict(kwargs)
    leaves = [name for name in ("logits", "hidden", "weight", "bias") if name in kwargs]
    for name in leaves:
        kwargs[name] = kwargs[name].detach().clone().requires_grad_()
    call = grpo_loss if "logits" in kwargs else linear_grpo_loss
    output = call(**kwargs, config=config, impl=impl)
    gradients = torch.autograd.grad(2 * output.loss, [kwargs[name] for name in leaves])
    tokens = output.tokens
    per_token = {
        "logprobs": output.logprobs,
        "entropy": output.entropy,
        "ratio": tokens.ratio,
        "gradient_mass": tokens.gradient_mass,
        "slope": tokens.slope,
        **({} if tokens.kl is None else {"kl": tokens.kl}),
    }
    assert all(value.shape == kwargs["targets"].shape for value in per_token.values())
    return {
        "loss": output.loss,
        **{name: value.reshape(-1) for name, value in per_token.items()},
        **{name: grad / 2 for name, grad in zip(leaves, gradients, strict=True)},
    }


def check(kwargs: dict, config: LossConfig, dtype: torch.dtype, impl: str, packed: bool) -> None:
    found, truth = public(kwargs, config, impl, packed=packed), oracle(kwargs, config)
    eager = truth if dtype == FLOAT64 else oracle(kwargs, config, dtype)
    summed = float(truth.pop("summed"))
    assert found.keys() == truth.keys()
    for name, right in truth.items():
        got = found[name].reshape(right.shape)
        if dtype == FLOAT64:
            scale = summed if name == "loss" else float(right.abs().max())
            assert torch.allclose(got, right, rtol=1e-9, atol=1e-12 * scale), (
                f"{name}: off by {float((got - right).abs().max()):.2e} of {scale:.2e}"
            )
        else:
            scale = summed if name == "loss" else 0.0
            assert_close_to_oracle(got, eager[name], right, name=name, scale=scale)


def grid(objective: str):
    """(name, config, dice) of every KL with every correction; (level, aggregation) take turns."""
    turns = itertools.cycle(itertools.product(AGGREGATIONS, LEVELS))
    for k, (kl, correction) in enumerate(itertools.product(KLS, CORRECTIONS)):
        aggregation, level = next(turns)
        dice = random.Random(f"{objective} {k}")
        masks = {name: value for name, value in MASKS.items() if dice.random() < 0.4}
        config = config_of(objective, level, aggregation, kl, correction, masks)
        yield f"{k}: {level} {aggregation} {kl} {correction} {masks}", config, dice


def with_logits(kwargs: dict) -> dict:
    """The call of `grpo_loss` that this call of `linear_grpo_loss` amounts to, but for the head."""
    head = ("hidden", "weight", "bias", "softcap", "logit_scale")
    logits = (kwargs["hidden"] @ kwargs["weight"].T).detach()
    return {"logits": logits} | {k: v for k, v in kwargs.items() if k not in head}


def check_grid(
    objective: str, impl: str, dtype: torch.dtype, device, *, step: int = 1, shape=(S, L, D, V)
) -> None:
    batch = sequences(dtype, device, shape=shape)
    # Another part of the grid for every objective.
    start = 3 * list(OBJECTIVES).index(objective) % step
    for name, config, dice in itertools.islice(grid(objective), start, None, step):
        kwargs = taking_turns(batch, config, dice)
        kwargs = with_logits(kwargs) if dice.random() < 0.3 else kwargs
        packed = dice.random() < 0.5
        try:
            check(kwargs, config, dtype, impl, packed)
        except AssertionError as error:
            others = sorted(kwargs.keys() - {"hidden", "weight", "targets", "mask"})
            raise AssertionError(f"{name}, {others}, packed={packed}: {error}") from error


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_torch_is_the_oracle(objective, device):
    check_grid(objective, "torch", FLOAT64, device)


@pytest.mark.parametrize("rows", [4, 13])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_torch_in_pieces_is_the_oracle(objective, rows, device, monkeypatch):
    """Chunks shorter than a sequence, and blocks of two sequences."""
    workspace = 4 * V * rows
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", {"cpu": workspace, "cuda": workspace})
    check_grid(objective, "torch", FLOAT64, device, step=9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_reference_is_the_oracle(objective, device):
    check_grid(objective, "reference", FLOAT64, device, step=12)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_torch_keeps_its_digits(objective, dtype, device):
    check_grid(objective, "torch", dtype, device, step=16)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_triton_is_the_oracle(objective, device):
    check_grid(objective, "triton", FLOAT32, device, step=40, shape=SMALL)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types_bring_level_and_aggregation_along(loss_type, device):
    needed = {"cispo": {"epsilon_high": 1.1}, "dro": {"dro_beta": 0.3}}.get(loss_type, {})
    config = LossConfig(loss_type=loss_type, max_completion_length=9, **needed)
    names = ("hidden", "weight", "targets", "advantages", "mask", "old_logprobs")
    batch = sequences(FLOAT64, device)
    check({name: batch[name] for name in names}, config, FLOAT64, "torch", packed=False)


def test_no_two_points_of_the_grid_are_the_same():
    """Every choice changes loss or gradient of the batch, so that one that is ignored shows."""
    batch = sequences(FLOAT64)
    names = ["hidden", "weight", "targets", "mask", "group_ids"]
    names += [f"{policy}_logprobs" for policy in ("ref", "old", "sampler")]
    # Without advantages of their own, tokens cannot tell `sequence` and `sequence_token` apart.
    kwargs = {name: batch[name] for name in names} | {"advantages": batch["token_advantages"]}

    def assert_distinct(configs: dict) -> None:
        results = {}
        for name, config in configs.items():
            found = oracle(kwargs, config)
            results[name] = torch.cat([found["loss"][None], found["weight"].reshape(-1)])
        for (a, x), (b, y) in itertools.combinations(results.items(), 2):
            assert not torch.allclose(x, y, rtol=1e-4), f"{a} and {b}"

    levels = {name: LEVELS if name in LEVELLED else LEVELS[:1] for name in OBJECTIVES}
    # The value of the ratio is all that CISPO takes of it.
    levels |= {name: LEVELS[:2] for name in OBJECTIVES if name.startswith("cispo")}
    levels[OF_SEQUENCES] = LEVELS[1:]
    points = [(name, level) for name in OBJECTIVES for level in levels[name]]
    assert_distinct({str(point): config_of(*point, "token_mean") for point in points})
    assert_distinct({name: config_of("clip", "token", name) for name in AGGREGATIONS})
    for choices in (KLS, CORRECTIONS, [{}, *({k: v} for k, v in MASKS.items())]):
        assert_distinct({str(x): config_of("clip", "token", "token_mean", x) for x in choices})


def test_own_objective_of_tokens_alone_needs_no_sequences(device):
    batch = as_packed(sequences(FLOAT64, device))
    names = ("hidden", "weight", "targets", "mask")
    kwargs = {name: batch[name] for name in names} | {"advantages": batch["token_advantages"]}

    def losses(objective):
        config = LossConfig(objective=objective, loss_type="vespo")
        return [
            linear_grpo_loss(**kwargs, config=config, impl=i).loss for i in ("torch", "reference")
        ]

    found, truth = losses(lambda tokens, config: -tokens.ratio * tokens.advantages)
    assert torch.allclose(found, truth, rtol=1e-12)
    with pytest.raises(InputError, match=r"per sequence: set importance_sampling_level = 'seq"):
        losses(own_of_sequences)


PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
# Results that have no entry a token.
WHOLE = ("loss", "weight", "bias")


@st.composite
def calls(draw, *, masks: tuple[str, ...] = tuple(MASKS)) -> tuple[dict, LossConfig]:
    """Keywords of a padded call in float64, and any config of the grid."""
    config = config_of(
        draw(st.sampled_from(sorted(OBJECTIVES))),
        draw(st.sampled_from(LEVELS)),
        draw(st.sampled_from(AGGREGATIONS)),
        draw(st.sampled_from(KLS)),
        draw(st.sampled_from(CORRECTIONS)),
        {name: MASKS[name] for name in draw(st.lists(st.sampled_from(masks), unique=True))},
    )
    dice = random.Random(draw(st.integers(0, 1000)))
    return taking_turns(sequences(FLOAT64, seed=dice.randrange(100)), config, dice), config


def per_sequence(kwargs: dict, change) -> dict:
    """The keywords with `change` of those that have an entry a sequence."""
    changed = per_token(kwargs, change)
    for name in ("advantages", "group_ids"):
        if name in kwargs and kwargs[name].dim() == 1:
            changed[name] = change(kwargs[name])
    return changed


def padded(found: dict) -> dict:
    """Results of `public` with per-token ones [S, L, ...]."""
    return {
        name: value if name in (*WHOLE, "hidden") else value.unflatten(0, (-1, L))
        for name, value in found.items()
    }


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-12), name


@PROPERTY
@given(calls(), st.permutations(range(S)))
def test_order_of_sequences_does_not_matter(call, order):
    kwargs, config = call
    found = padded(public(per_sequence(kwargs, lambda x: x[order]), config, "torch"))
    expected = padded(public(kwargs, config, "torch"))
    assert_same(found, {k: v if k in WHOLE else v[order] for k, v in expected.items()})


@PROPERTY
@given(
    calls(masks=("entropy_coef", "off_policy_mask_threshold")),
    st.lists(st.sampled_from([2, 4]), unique=True),
)
def test_micro_batches_add_up_to_the_step(call, cuts):
    """Cut between groups, with the normalisers of the step. (A quantile is one of its call.)"""
    kwargs, config = call
    tokens = float(kwargs["mask"].sum())
    normaliser = {"token_mean": tokens, "constant": S * 9.0, "prompt_mean": 3.0}
    normalisers = {
        "denominator": normaliser.get(config.adds_up, float(S)),
        "entropy_denominator": tokens,
    }
    expected = public({k: v for k, v in kwargs.items() if k not in normalisers}, config, "torch")
    parts = [
        public(per_sequence(kwargs | normalisers, lambda x, a=a, b=b: x[a:b]), config, "torch")
        for a, b in itertools.pairwise([0, *sorted(cuts), S])
    ]
    found = {name: [part[name] for part in parts] for name in expected}
    assert_same({k: sum(v) if k in WHOLE else torch.cat(v) for k, v in found.items()}, expected)


@PROPERTY
@given(calls(), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_lies_under_the_mask_changes_no_bit(call, garbage):
    kwargs, config = call
    hole = ~kwargs["mask"]

    def fill(x: torch.Tensor, content: float) -> torch.Tensor:
        if x.dtype == torch.bool:
            return x
        if not x.is_floating_point():
            content = 10**6 if content else -100
        return x.masked_fill(hole.view(*hole.shape, *[1] * (x.dim() - 2)), content)

    clean, dirty = (
        public(per_token(kwargs, lambda x, content=content: fill(x, content)), config, "torch")
        for content in (0.0, garbage)
    )
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


@PROPERTY
@given(calls(), st.lists(st.integers(0, L), min_size=S, max_size=S))
def test_packed_is_padded(call, lengths):
    """Packed, a sequence has no row beyond its length."""
    kwargs, config = call
    # As many tokens as sequences: advantages [S] would be one a token.
    assume(sum(lengths) != S)
    inside = torch.arange(L) < torch.tensor(lengths)[:, None]
    kwargs["mask"] = kwargs["mask"] & inside
    packed = per_token(kwargs, lambda x: x[inside])
    packed["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    expected = padded(public(kwargs, config, "torch"))
    found = public(packed, config, "torch")
    assert_same(found, {k: v if k in WHOLE else v[inside] for k, v in expected.items()})


@PROPERTY
@given(calls(), st.floats(-1e3, 1e3))
def test_gradient_is_linear_in_what_comes_in(call, factor):
    kwargs, config = call
    leaves = [kwargs[name].requires_grad_() for name in ("hidden", "weight")]
    loss = linear_grpo_loss(**kwargs, config=config, impl="torch").loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(loss, leaves, torch.tensor(factor, dtype=FLOAT64))
    for a, b in zip(once, scaled, strict=True):
        assert torch.allclose(a * factor, b, rtol=1e-12)


@PROPERTY
@given(calls(), st.lists(st.integers(0, S - 1), unique=True))
def test_skipping_rows_without_advantage_changes_nothing(call, idle):
    """But what it does not measure, which is NaN."""
    kwargs, config = call
    kwargs["advantages"] = kwargs["advantages"].clone()
    kwargs["advantages"][idle] = 0.0
    expected = public(kwargs, dataclasses.replace(config, skip_zero_advantage=False), "torch")
    found = public(kwargs, config, "torch")
    for name in (*WHOLE, "hidden"):
        assert name not in found or not found[name].isnan().any()
    measured = {k: torch.where(v.isnan(), expected[k], v) for k, v in found.items()}
    assert_same(measured, expected)
