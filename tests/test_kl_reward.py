"""KL in the reward: against its definition, padded and packed, and bad arguments."""

import math

import pytest
import torch

from grpo_fast import InputError, group_advantages, kl_in_reward, reference

NAN = math.nan
IMPLS = ["torch", "triton", "reference"]
VALUES = {
    "k1": lambda d: d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
    "abs": abs,
}


def batch(device) -> dict:
    """Three sequences of up to five tokens, the second empty, with garbage under the mask."""
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(3, 5, generator=generator) * 3
    mask = torch.tensor([[1, 1, 1, 0, 0], [0] * 5, [1, 0, 1, 1, 1]])
    ref = (logp + torch.randn(3, 5, generator=generator)).clamp(max=0)
    return {
        "logprobs": torch.where(mask == 1, logp, NAN).to(device),
        "ref_logprobs": torch.where(mask == 1, ref, -math.inf).to(device),
        "mask": mask.to(device),
    }


def by_hand(rewards, logprobs, ref_logprobs, mask, *, beta, value) -> list[float]:
    """Token by token, in Python."""
    expected = []
    for i, reward in enumerate(rewards):
        tokens = zip(logprobs[i].tolist(), ref_logprobs[i].tolist(), mask[i].tolist(), strict=True)
        expected.append(reward - beta * sum(value(p - q) for p, q, live in tokens if live))
    return expected


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("estimator", VALUES)
def test_padded_by_hand(estimator, impl, device):
    given = batch(device)
    rewards = [1.0, -2.0, 0.5]
    found = kl_in_reward(rewards, beta=0.3, kl_estimator=estimator, impl=impl, **given)
    assert found.dtype == torch.float32
    expected = by_hand(rewards, beta=0.3, value=VALUES[estimator], **given)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert found[1] == -2.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_is_padded(dtype, impl, device):
    given = batch(device)
    rewards = torch.tensor([1.0, -2.0, 0.5], device=device)
    padded = kl_in_reward(rewards, beta=0.3, impl=impl, **given)
    cu_seqlens = torch.tensor([0, 5, 10, 15], dtype=dtype, device=device)
    flat = {name: value.reshape(-1) for name, value in given.items()}
    packed = kl_in_reward(rewards, beta=0.3, cu_seqlens=cu_seqlens, impl=impl, **flat)
    assert torch.equal(packed, padded)
    live = given["mask"].reshape(-1) == 1
    short = {name: value[live] for name, value in flat.items() if name != "mask"}
    offsets = torch.tensor([0, 3, 3, 7], dtype=dtype, device=device)
    packed = kl_in_reward(rewards, beta=0.3, cu_seqlens=offsets, impl=impl, **short)
    assert torch.allclose(packed, padded, rtol=1e-6)


def test_the_kl_is_the_loss_s(device):
    """One definition of the estimators, and of the clamp."""
    logp = torch.tensor([[-1.0, -0.5, -0.1]], device=device)
    ref = torch.tensor([[-2.0, -30.0, -0.2]], device=device)
    kl = reference.kl_divergence(logp, ref, estimator="k3", limit=5.0)
    found = kl_in_reward([0.0], logp, ref, beta=1.0, kl_estimator="k3", log_ratio_clamp=5.0)
    assert found.tolist() == pytest.approx([-float(kl.sum())])
    assert -float(found) < 1 + 5 + 0.1


def test_what_was_not_scored_stays_so(device):
    given = batch(device)
    found = kl_in_reward([1.0, NAN, 1.0], beta=0.1, **given)
    assert found.isnan().tolist() == [False, True, False]
    assert group_advantages(found, group_size=3).advantages[1] == 0


def test_float64_stays_and_nothing_has_a_gradient(device):
    given = batch(device)
    logp = given.pop("logprobs").double().requires_grad_()
    found = kl_in_reward([1.0, 1.0, 1.0], logp, beta=0.1, **given)
    assert found.dtype == torch.float64
    assert not found.requires_grad


def test_beta_0_is_the_reward(device):
    assert kl_in_reward([1.0, 2.0, 3.0], beta=0.0, **batch(device)).tolist() == [1.0, 2.0, 3.0]


P, Q = torch.zeros(2, 3) - 1, torch.zeros(2, 3) - 2
R = [0.0, 1.0]
BAD = {
    "estimator": ((R, P, Q), {"kl_estimator": "k3+"}, "for rewards: did you mean 'k3'.*k1, k2, k3"),
    "beta": ((R, P, Q), {"beta": NAN}, "beta = nan, expected a finite number >= 0"),
    "clamp": ((R, P, Q), {"log_ratio_clamp": -1.0}, "log_ratio_clamp = -1.0"),
    "rewards": (([0.0], P, Q), {}, r"rewards has shape \(1,\), expected \(2,\), one a sequence"),
    "kind": ((R, P.long(), Q), {}, "logprobs is .* torch.int64"),
    "no-tensor": ((R, P, [0.0]), {}, "ref_logprobs is list, expected a torch.Tensor"),
    "dims": ((R, P[None], Q), {}, r"logprobs has shape \(1, 2, 3\), expected \[S, L\] padded"),
    "ref": (
        (R, P, Q[:1]),
        {},
        r"ref_logprobs has shape \(1, 3\), expected \(2, 3\) like logprobs",
    ),
    "mask": (
        (R, P, Q),
        {"mask": torch.ones(2)},
        r"mask has shape \(2,\), expected \(2, 3\) like",
    ),
    "mask-value": ((R, P, Q), {"mask": P}, "mask must be 0 or 1, found -1.0"),
    "no-bounds": ((R, P[0], Q[0]), {}, r"need cu_seqlens .*found logprobs \(3,\) without"),
    "bounds": (
        (R, P, Q),
        {"cu_seqlens": torch.tensor([0, 3, 6])},
        r"found logprobs \(2, 3\) with",
    ),
    "offsets": (
        (R, P[0], Q[0]),
        {"cu_seqlens": torch.tensor([0, 1, 4])},
        "from 0 to 3, the number of tokens",
    ),
    "nan": ((R, P, torch.tensor([[-1.0] * 3, [-1, NAN, -1]])), {}, "of sequence 1 are not finite"),
    "inf": ((R, P - math.inf, Q), {}, "of sequence 0 are not finite at a token that counts"),
}


@pytest.mark.parametrize("arguments, options, message", BAD.values(), ids=BAD.keys())
def test_bad_argument_is_named(arguments, options, message):
    with pytest.raises(InputError, match=message) as error:
        kl_in_reward(*arguments, **{"beta": 0.1} | options)
    assert "\n" not in str(error.value)
