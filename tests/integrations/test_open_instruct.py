"""open-instruct's contract, restated eagerly: it is no package that could be installed here, so
nothing of this runs inside it."""

import sys
import types

import pytest
import torch

from grpo_fast.errors import ConfigError
from grpo_fast.integrations import open_instruct
from grpo_fast.integrations.open_instruct import compute_grpo_loss, forward_for_logprobs
from grpo_fast.tiny import tiny_model


def test_forward_for_logprobs_keeps_the_contract():
    model, pad = tiny_model().eval(), 0
    ids = torch.arange(3, 17).view(2, 7)
    ids[0, -2:] = pad
    positions = torch.arange(7).expand(2, 7)
    logits = model(ids, position_ids=positions).logits[:, :-1] / 0.7
    log_p = logits.log_softmax(-1)
    expected = log_p.gather(-1, ids[:, 1:][..., None])[..., 0]
    logp, entropy = forward_for_logprobs(model, ids, None, positions, pad, 0.7, True)
    assert torch.allclose(logp, expected, atol=1e-5)
    assert torch.allclose(entropy, -(log_p.exp() * log_p).sum(-1), atol=1e-5)
    assert not entropy.requires_grad
    logp.sum().backward()
    assert model.get_input_embeddings().weight.grad.any()
    # An id that the vocabulary does not have may stand for padding.
    beyond = ids.masked_fill(ids == pad, 0)
    plain, nothing = forward_for_logprobs(model, beyond, None, positions, 10**6, 0.7)
    assert nothing is None
    assert torch.allclose(plain, logp, atol=1e-6)


def test_rows_packed_by_position_ids_do_not_see_each_other():
    model = tiny_model().eval()
    ids = torch.arange(3, 13)[None]
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    whole, _ = forward_for_logprobs(model, ids, None, packed, 0, 1.0)
    alone, _ = forward_for_logprobs(model, ids[:, 5:], None, packed[:, 5:], 0, 1.0)
    assert torch.allclose(whole[:, 5:], alone, atol=1e-5)


def arguments() -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(3, 8, generator=generator, dtype=torch.float64)

    logp = -normal().abs()
    return {
        "logp": logp,
        "old": logp + 0.4 * normal(),
        "advantages": normal(),
        "ref": logp + 0.3 * normal(),
        "rho": (1 + normal()).clamp(min=0.0),
    }


def restated(logp, old, advantages, ref, rho, config):
    """The contract of open-instruct e6c3044, as formulas."""
    ratio = (logp - old).exp()
    low, high = 1 - config.clip_lower, 1 + config.clip_higher
    if config.loss_fn == "dapo":
        held = -advantages * ratio.clamp(low, high)
        loss = torch.maximum(-advantages * ratio, held)
        clipped = held > -advantages * ratio
    else:
        loss = -advantages * ratio.detach().clamp(max=high) * logp
        clipped = ratio > high
    d = logp - ref
    kl = (d, d * d / 2, torch.expm1(-d) + d, ratio * d)[config.kl_estimator]
    return loss * rho, clipped * (rho != 0), kl


def config(**options):
    plain = {"loss_fn": "dapo", "clip_lower": 0.2, "clip_higher": 0.272, "kl_estimator": 2}
    return types.SimpleNamespace(**plain | options)


@pytest.mark.parametrize("estimator", range(4))
@pytest.mark.parametrize("loss_fn", ["dapo", "cispo"])
def test_compute_grpo_loss_keeps_the_contract(loss_fn, estimator):
    options = config(loss_fn=loss_fn, kl_estimator=estimator)
    given = arguments()
    slopes = []
    for function in (restated, None):
        logp = given["logp"].clone().requires_grad_()
        if function is None:
            ratio = (logp - given["old"]).exp()
            found = compute_grpo_loss(
                logp, ratio, given["advantages"], given["ref"], options, given["rho"]
            )
        else:
            found = expected = restated(**given | {"logp": logp}, config=options)
        slopes.append(torch.autograd.grad((found[0] + 0.1 * found[2]).sum(), logp)[0])
    assert expected[1].any()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.double(), theirs.double(), atol=1e-12)
    assert torch.allclose(*slopes, atol=1e-12)


def test_without_a_reference_the_kl_is_zero():
    given = arguments()
    ratio = torch.ones_like(given["logp"])
    kl = compute_grpo_loss(given["logp"], ratio, given["advantages"], None, config(), ratio)[2]
    assert kl.shape == ratio.shape
    assert not kl.any()


@pytest.mark.parametrize(
    "options, words",
    [({"loss_fn": "tvpo"}, "loss_fn = 'tvpo'"), ({"kl_estimator": 4}, "kl_estimator = 4")],
    ids=str,
)
def test_an_option_without_equivalent_is_named(options, words):
    given = arguments()
    one = torch.ones_like(given["logp"])
    with pytest.raises(ConfigError, match=words):
        compute_grpo_loss(given["logp"], one, one, given["ref"], config(**options), one)


def test_olmo_core_is_refused():
    with pytest.raises(ConfigError, match="for OLMo-core models"):
        forward_for_logprobs(None, None, None, None, 0, 1.0, pass_olmo_core_doc_lens=True)


def test_register_exchanges_both_functions(monkeypatch):
    host = types.ModuleType("open_instruct.grpo_utils")

    def theirs(
        model,
        query_responses,
        attention_mask,
        position_ids,
        pad_token_id,
        temperature,
        return_entropy=False,
        pass_olmo_core_doc_lens=False,
    ):
        raise AssertionError

    def loss(new_logprobs, ratio, advantages, ref_logprobs, config, rho_weights):
        raise AssertionError

    host.forward_for_logprobs, host.compute_grpo_loss = theirs, loss
    monkeypatch.setitem(sys.modules, "open_instruct", types.ModuleType("open_instruct"))
    monkeypatch.setitem(sys.modules, "open_instruct.grpo_utils", host)
    open_instruct.register()
    try:
        assert host.forward_for_logprobs is forward_for_logprobs
        assert host.compute_grpo_loss is compute_grpo_loss
        with pytest.raises(ConfigError, match="already"):
            open_instruct.register()
    finally:
        open_instruct.unregister()
    assert (host.forward_for_logprobs, host.compute_grpo_loss) == (theirs, loss)
    host.compute_grpo_loss = lambda new_logprobs, ratio, tis_weights: None
    with pytest.raises(ConfigError, match="compute_grpo_loss of open-instruct takes"):
        open_instruct.register()
    assert host.forward_for_logprobs is theirs
    monkeypatch.setitem(sys.modules, "open_instruct.grpo_utils", None)
    with pytest.raises(ConfigError, match="install open-instruct from its repository"):
        open_instruct.register()
