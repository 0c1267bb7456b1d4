"""OpenRLHF's contract, restated eagerly: OpenRLHF needs DeepSpeed and Ray and is not installed
here, so nothing of this runs inside it."""

import itertools
import sys
import types

import pytest
import torch

from grpo_fast.errors import ConfigError
from grpo_fast.integrations import openrlhf
from grpo_fast.integrations.openrlhf import PolicyLoss, actor_forward
from grpo_fast.tiny import tiny_model


def arguments() -> dict:
    """[S, L] in float64, the last sequence without an action."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logp = -normal(5, 9).abs() - 0.1
    mask = torch.rand(5, 9, generator=generator) < 0.7
    mask[-1] = False
    return {
        "log_probs": logp,
        "old_log_probs": (logp + 0.4 * normal(5, 9)).clamp(max=-1e-3),
        "advantages": normal(5, 1).expand(5, 9),
        "action_mask": mask,
        "rollout_log_probs": (logp + 0.5 * normal(5, 9)).clamp(max=-1e-3),
    }


def mean(x, mask, dim=None):
    return (x * mask).sum(dim) / mask.sum(dim)


def restated(
    given,
    *,
    low=0.2,
    high=0.2,
    dual=None,
    gspo=False,
    by_token=True,
    level="off",
    mode="mask",
    gating="ratio",
    bounds=(0.5, 5.0),
    step=None,
    ranks=1,
):
    """The contract of OpenRLHF 0.11.2, word for word as formulas; the empty sequence left out of
    means over tokens of a sequence."""
    logp, old, advantages, mask, sampler = given.values()
    log_ratio = logp - (sampler if gspo and level != "off" else old)
    ratio = log_ratio.exp()
    if gspo:
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        ratio = ((log_ratio * mask).sum(-1, keepdim=True) / lengths).exp() * mask
    free, held = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    gain = torch.minimum(free, held)
    if dual is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual * advantages), gain)
    loss, kl, share = -gain, None, None
    if level != "off" and not gspo:
        kl = mean(sampler - old, mask)
        u = old - sampler
        p, q = sampler.exp(), old.exp()
        statistic = {
            "ratio": u,
            "tv": (p - q).abs(),
            "binary_kl": p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(),
        }[gating]
        if level == "seq":
            lengths = mask.sum(-1, keepdim=True).clamp(min=1)
            statistic = (statistic * mask).sum(-1, keepdim=True) / lengths
        statistic = statistic.exp() if gating == "ratio" else statistic
        inside = (statistic >= bounds[0]) & (statistic <= bounds[1])
        share = (~inside).double().mean() if level == "seq" else mean((~inside).double(), mask)
        loss = loss * (statistic.clamp(*bounds) if mode == "clip" else u.exp() * inside)
    if by_token and not gspo:
        total = (loss * mask).sum() / (mask.sum() if step is None else step / ranks)
    else:
        rows = (loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        total = rows.sum() / (mask.any(-1).sum() if step is None else step / ranks)
    return total, mean((held < free).double(), mask), mean(old - logp, mask).detach(), kl, share


CASES = [
    ({}, {}),
    ({"clip_eps_low": 0.1, "clip_eps_high": 0.28}, {"low": 0.1, "high": 0.28}),
    ({"dual_clip": 1.3}, {"dual": 1.3}),
    ({"token_level_loss": False}, {"by_token": False}),
    ({"policy_loss_type": "gspo"}, {"gspo": True}),
    (
        {"policy_loss_type": "gspo", "is_correction_level": "token"},
        {"gspo": True, "level": "token"},
    ),
    (
        {
            "is_correction_level": "token",
            "is_correction_mode": "clip",
            "is_correction_threshold": (0.8, 1.2),
        },
        {"level": "token", "mode": "clip", "bounds": (0.8, 1.2)},
    ),
    *(
        (
            {
                "is_correction_level": level,
                "is_correction_gating": gating,
                "is_correction_threshold": bounds,
            },
            {"level": level, "gating": gating, "bounds": bounds},
        )
        for level, (gating, bounds) in itertools.product(
            ("token", "seq"),
            (("ratio", (0.9, 1.1)), ("binary_kl", (0.0, 0.1)), ("tv", (0.0, 0.14))),
        )
    ),
]


@pytest.mark.parametrize("step, ranks", [(None, 1), (64.0, 4)])
@pytest.mark.parametrize("options, formula", CASES, ids=lambda x: str(x))
def test_policy_loss_keeps_the_contract(options, formula, step, ranks):
    given = arguments()
    logp = given["log_probs"].requires_grad_()
    expected = restated(given, **formula, step=step, ranks=ranks)
    whole = {"dp_size": ranks, "batch_num_tokens": step, "global_batch_size": step}
    found = PolicyLoss(**options)(**given, **whole)
    assert len(found) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6)
    slopes = [torch.autograd.grad(x[0], logp)[0] for x in (found, expected)]
    assert slopes[1].any()
    assert torch.allclose(*slopes, atol=1e-12)


@pytest.mark.parametrize("options, formula", CASES[1:], ids=lambda x: str(x))
def test_every_option_of_a_case_changes_the_loss(options, formula):
    given = arguments()
    assert float(restated(given, **formula)[0]) != pytest.approx(float(restated(given)[0]))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"policy_loss_type": "cispo"}, "policy_loss_type = 'cispo': choose one of ppo, gspo"),
        ({"is_correction_level": "turn"}, "is_correction_level = 'turn'"),
        ({"is_correction_mode": "clip", "is_correction_level": "seq"}, "bounds the ratio of a"),
        ({"is_correction_level": "seq", "is_correction_gating": "tv"}, "has no lower bound"),
        ({"dual_clip": 0.5}, "dual_clip = 0.5 is out of range"),
    ],
    ids=str,
)
def test_an_option_without_equivalent_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        PolicyLoss(**options)


def test_a_correction_needs_the_sampler():
    given = arguments() | {"rollout_log_probs": None}
    with pytest.raises(ConfigError, match="needs rollout_log_probs"):
        PolicyLoss(is_correction_level="token")(**given)


def actor(**options):
    model = tiny_model(**options).eval()
    return types.SimpleNamespace(model=model, packing_samples=False, temperature=0.7)


def batch():
    """Two sequences, the first padded on the left; the last three tokens are actions."""
    sequences = torch.arange(3, 17).view(2, 7)
    attention = torch.ones_like(sequences)
    attention[0, :2] = 0
    actions = torch.tensor([[1, 1, 0], [1, 1, 1]])
    return sequences, actions, attention


def eager(actor, sequences, attention):
    positions = (attention.cumsum(-1) - 1).masked_fill(attention == 0, 1)
    logits = actor.model(sequences, attention_mask=attention, position_ids=positions).logits
    log_p = (logits / actor.temperature).log_softmax(-1)
    logp = log_p.gather(-1, sequences.roll(-1, 1)[..., None])[..., 0]
    return logp[:, :-1], -(log_p.exp() * log_p).sum(-1)[:, :-1]


def test_actor_forward_keeps_the_contract():
    host, (sequences, actions, attention) = actor(), batch()
    logp, entropy = eager(host, sequences, attention)
    found, output = actor_forward(
        host, sequences, actions, attention, return_output=True, return_entropy=True
    )
    assert torch.allclose(found, logp[:, -3:] * actions, atol=1e-5)
    assert torch.allclose(output.entropy, entropy, atol=1e-5)
    whole = actor_forward(host, sequences, attention_mask=attention, return_logprobs=True)
    assert torch.allclose(whole, logp, atol=1e-5)
    found.sum().backward()
    assert host.model.get_input_embeddings().weight.grad.any()


@pytest.fixture
def package(monkeypatch):
    """Stub modules under OpenRLHF's names: its unpadding, without ring attention, and the classes
    that `register` exchanges."""

    class Actor:
        def forward(
            self,
            sequences,
            action_mask=None,
            attention_mask=None,
            return_output=False,
            allgather_logits=False,
            return_logprobs=False,
            ring_attn_group=None,
            packed_seq_lens=None,
            return_entropy=False,
            **mm_inputs,
        ):
            return "logits"

    class Loss(torch.nn.Module):
        __init__, forward = PolicyLoss.__init__, PolicyLoss.forward

    def unpad(sequences, attention, group):
        (indices,) = attention.flatten().nonzero(as_tuple=True)
        positions = (attention.cumsum(-1) - 1).flatten()[indices]
        ids, labels = (x.flatten()[indices] for x in (sequences, sequences.roll(-1, 1)))
        return ids[None], positions[None], labels[None], 0, indices

    def pad(values, group, extra, indices, batch, length):
        whole = values.new_zeros(batch * length)
        return whole.index_copy(0, indices, values[0]).view(batch, length)

    for name in ("openrlhf", "openrlhf.models", "openrlhf.models.ring_attn_utils", "a_worker"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    ring = sys.modules["openrlhf.models.ring_attn_utils"]
    ring.unpad_and_slice_tensor, ring.gather_and_pad_tensor = unpad, pad
    models = sys.modules["openrlhf.models"]
    models.Actor, models.PolicyLoss = Actor, Loss
    sys.modules["a_worker"].PolicyLoss = Loss
    yield models
    openrlhf.unregister()


def test_packed_rows_are_unpadded_by_openrlhf_itself(package):
    host, (sequences, actions, attention) = actor(), batch()
    host.packing_samples = True
    logp, entropy = eager(host, sequences, attention)
    found, output = actor_forward(
        host, sequences, actions, attention, return_output=True, return_entropy=True
    )
    assert torch.allclose(found, logp[:, -3:] * actions, atol=1e-5)
    seen = attention[:, :-1].bool()
    assert torch.allclose(output.entropy[seen], entropy[seen], atol=1e-5)


def test_register_exchanges_both_and_unregister_puts_them_back(package):
    before, forward = package.PolicyLoss, package.Actor.forward
    with pytest.raises(ConfigError, match="set return_logprobs=True"):
        actor_forward(actor(), *batch()[:1])
    openrlhf.register()
    assert package.PolicyLoss is sys.modules["a_worker"].PolicyLoss is PolicyLoss
    assert package.Actor.forward is actor_forward
    assert package.Actor().forward(torch.zeros(1, 1), return_output=True) == "logits"
    with pytest.raises(ConfigError, match=r"call unregister\(\) before"):
        openrlhf.register()
    openrlhf.unregister()
    assert package.PolicyLoss is sys.modules["a_worker"].PolicyLoss is before
    assert package.Actor.forward is forward


def test_another_version_or_none_is_named(package, monkeypatch):
    class Old(torch.nn.Module):
        def __init__(self, clip_eps_low=0.2):
            super().__init__()

    package.PolicyLoss = Old
    with pytest.raises(ConfigError, match=r"PolicyLoss of openrlhf takes \(self, clip_eps_low\)"):
        openrlhf.register()
    monkeypatch.setitem(sys.modules, "openrlhf.models", None)
    with pytest.raises(ConfigError, match=r"pip install 'openrlhf==0.11.2'"):
        openrlhf.register()


def test_images_and_routers_are_refused():
    host, (sequences, actions, attention) = actor(), batch()
    with pytest.raises(ConfigError, match="for images"):
        actor_forward(host, sequences, actions, attention, pixel_values=torch.zeros(1))
    host.model.config.output_router_logits = True
    with pytest.raises(ConfigError, match="set aux_loss_coef = 0"):
        actor_forward(host, sequences, actions, attention)
