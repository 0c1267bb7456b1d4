"""verl's contract, against verl as installed: every policy loss by value, gradient and metrics, the
fused head by log-probs, entropy and gradients, and what `register` refuses."""

import importlib
import importlib.metadata
import types

import pytest
import torch

from grpo_bench.hosts import random_batch, verl_config, verl_core
from grpo_fast import LossConfig
from grpo_fast.errors import ConfigError
from grpo_fast.integrations import verl
from grpo_fast.presets import VERL_AGGREGATIONS
from grpo_fast.testing import assert_close_to_oracle
from grpo_fast.tiny import tiny_model

pytestmark = pytest.mark.host
LIMIT = 1e-7  # verl adds 1e-8 to lengths
STEP = {"batch_num_tokens": 1000, "global_batch_size": 64, "dp_size": 4}
OPTIONS = {
    "dro": {"policy_loss": {"dro_beta": 0.3}},
    "dppo_tv": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.01, "clip_ratio_c": 1.2},
    "dppo_kl": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.01, "clip_ratio_c": 1.2},
    "vanilla": {"clip_ratio_c": 1.5},
    "gspo": {"clip_ratio_c": 1.1},
}


@pytest.fixture
def registered():
    core = verl_core()
    verl.register()
    yield core
    verl.unregister()


def arguments(weights: bool = False) -> dict:
    """Of a policy loss, [S, L], in float64; the first sequence has no live token."""
    batch = random_batch()
    mask = batch["mask"]
    old = batch["old_logprobs"].masked_fill(~mask, 0.0).double()
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(4)).double()
    given = {
        "old_log_prob": old,
        "log_prob": (old + 0.4 * noise).clamp(max=-1e-3),
        "advantages": batch["advantages"][:, None].expand_as(old).double(),
        "response_mask": mask,
    }
    if weights:
        given["rollout_is_weights"] = (1 + 0.3 * noise.flip(0)).clamp(min=0.1)
    return given


def run(function, given: dict, mode: str, config):
    logp = given["log_prob"].clone().requires_grad_()
    default = torch.get_default_dtype()
    # verl makes masks in the default dtype.
    torch.set_default_dtype(torch.float64)
    try:
        loss, metrics = function(**given | {"log_prob": logp}, loss_agg_mode=mode, config=config)
    finally:
        torch.set_default_dtype(default)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics


@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("aggregation", VERL_AGGREGATIONS)
@pytest.mark.parametrize("mode", verl.MODES)
@pytest.mark.parametrize("info", [{}, STEP], ids=["call", "step"])
def test_every_policy_loss_is_verl_s(registered, mode, aggregation, weights, info):
    given = arguments(weights)
    options = dict(OPTIONS.get(mode, {})) | {"loss_agg_mode": aggregation}
    policy = {"loss_mode": f"grpo_fast_{mode}", **options.pop("policy_loss", {})}
    config = verl_config(policy_loss=policy, global_batch_info=info, **options)
    theirs = run(registered.get_policy_loss_fn(mode), given, aggregation, config)
    ours = run(registered.get_policy_loss_fn(f"grpo_fast_{mode}"), given, aggregation, config)
    assert float(ours[0]) == pytest.approx(float(theirs[0]), abs=LIMIT)
    assert theirs[1].any()
    assert float((ours[1] - theirs[1]).abs().max() / theirs[1].abs().max()) <= LIMIT
    assert ours[2].keys() == theirs[2].keys()
    for name, value in theirs[2].items():
        assert float(ours[2][name]) == pytest.approx(value, abs=1e-6), name


def test_the_metrics_of_these_cases_are_not_all_zero(registered):
    """Otherwise the test above would show nothing of them."""
    for mode in ("vanilla", "gspo", "geo_mean", "cispo", "dppo_tv", "dppo_kl"):
        config = verl_config(policy_loss={"loss_mode": mode}, **OPTIONS.get(mode, {}))
        metrics = run(registered.get_policy_loss_fn(mode), arguments(), "token-mean", config)[2]
        assert metrics["actor/pg_clipfrac"] > 0, mode
        if mode in ("vanilla", "geo_mean"):
            assert metrics["actor/pg_clipfrac_lower"] > 0, mode


def test_grpo_fast_alone_is_vanilla_and_a_config_of_one_s_own_has_a_name():
    core = verl_core()
    own = LossConfig(loss_type="vespo")
    verl.register(my_vespo=own)
    try:
        given, config = arguments(), verl_config()
        one, other = (core.get_policy_loss_fn(x) for x in ("grpo_fast", "grpo_fast_vanilla"))
        same = (run(x, given, "token-mean", config) for x in (one, other))
        assert len({float(x[0]) for x in same}) == 1
        vespo = run(core.get_policy_loss_fn("my_vespo"), given, "token-mean", config)
        assert vespo[1].any()
        assert vespo[0] != run(one, given, "token-mean", config)[0]
    finally:
        verl.unregister()
    assert not [name for name in core.POLICY_LOSS_REGISTRY if name in (*verl.NAMES, "my_vespo")]


@pytest.mark.parametrize(
    "own, words",
    [
        (LossConfig(beta=0.1), "KL and entropy are the host's own terms"),
        (LossConfig(importance_sampling_correction="token_mask"), "the host computes"),
    ],
    ids=["kl", "correction"],
)
def test_what_verl_adds_itself_is_refused(own, words):
    with pytest.raises(ConfigError, match=words):
        verl.policy_loss("vanilla", own)(**arguments(), config=verl_config())


def test_a_call_without_config_or_with_an_unknown_sum_is_named():
    with pytest.raises(ConfigError, match="config is missing"):
        verl.policy_loss("vanilla")(**arguments())
    for own in (None, LossConfig()):
        loss = verl.policy_loss("vanilla", own)
        with pytest.raises(ConfigError, match="loss_agg_mode = 'mean'"):
            loss(**arguments(), loss_agg_mode="mean", config=verl_config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(24,), (3, 8)], ids=str)
def test_the_fused_head_has_verl_s_outputs_and_gradients(dtype, shape):
    verl_core()
    functional = importlib.import_module("verl.utils.experimental.torch_functional")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(37, 16, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 37, shape, generator=generator)

    def outcome(module, kind):
        h, w = (x.to(dtype).to(kind).requires_grad_() for x in (hidden, weight))
        logp, entropy = module(h, w, ids, 0.7)
        (logp.sum() + 0.3 * entropy.sum()).backward()
        return {"logp": logp, "entropy": entropy, "hidden": h.grad, "weight": w.grad}

    def exact(h, w, ids, temperature):
        log_p = (h @ w.T / temperature).log_softmax(-1)
        return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)

    truth = outcome(exact, torch.float64)
    ours = outcome(verl.FusedLinearForPPO(chunk_size=8), dtype)
    theirs = outcome(functional.FusedLinearForPPO(chunk_size=8), dtype)
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        assert_close_to_oracle(tensor, theirs[name], truth[name], name=name, factor=3.0)
    assert ours["logp"].dtype == ours["entropy"].dtype == torch.float32


def forward(model, ids, name="forward_with_torch_backend", **more):
    dense = importlib.import_module("verl.models.transformers.dense_common")
    return getattr(dense, name)(model, input_ids=ids, return_dict=True, **more)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_verl_s_forward_goes_through_our_head(registered, backend):
    model, ids = tiny_model().eval(), torch.arange(3, 15)[None]
    labels = ids.roll(-1)
    found = forward(
        model, ids, f"forward_with_{backend}_backend", temperature=0.7, shift_labels=labels
    )
    log_p = (model(ids).logits / 0.7).log_softmax(-1)
    expected = log_p.gather(-1, labels[..., None])[..., 0]
    assert torch.allclose(found.log_probs.view(1, -1), expected, atol=1e-5)
    assert torch.allclose(found.entropy.view(1, -1), -(log_p.exp() * log_p).sum(-1), atol=1e-5)
    found.log_probs.sum().backward()
    assert model.get_input_embeddings().weight.grad.any()


def test_a_head_with_an_adapter_or_in_eight_bits_is_refused(registered):
    from peft import LoraConfig, get_peft_model

    ids = torch.arange(3, 9)[None]
    model = tiny_model(tie_word_embeddings=False)
    get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(ConfigError, match="has a peft adapter"):
        forward(model, ids)
    model = tiny_model(tie_word_embeddings=False)
    eight = torch.zeros_like(model.lm_head.weight, dtype=torch.int8)
    model.lm_head.weight = torch.nn.Parameter(eight, requires_grad=False)
    with pytest.raises(ConfigError, match="is quantised .*llm_int8_skip_modules"):
        forward(model, ids)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(0, 32))
    with pytest.raises(ConfigError, match="use ZeRO stage 2"):
        forward(model, ids)


def test_unregister_puts_back_what_register_took(monkeypatch):
    verl_core()
    functional = importlib.import_module("verl.utils.experimental.torch_functional")
    dense = importlib.import_module("verl.models.transformers.dense_common")
    before = functional.FusedLinearForPPO, dense.forward_with_torch_backend
    verl.register()
    assert functional.FusedLinearForPPO is verl.FusedLinearForPPO
    with pytest.raises(ConfigError, match=r"registered in verl already: call unregister\(\)"):
        verl.register()
    verl.unregister()
    assert before == (functional.FusedLinearForPPO, dense.forward_with_torch_backend)
    with pytest.raises(ConfigError, match="a policy loss vanilla already"):
        verl.register(vanilla=LossConfig())
    changed = types.new_class("FusedLinearForPPO", (torch.nn.Module,))
    changed.forward = lambda self, hidden, head: None
    monkeypatch.setattr(functional, "FusedLinearForPPO", changed)
    with pytest.raises(ConfigError, match="FusedLinearForPPO of verl takes"):
        verl.register()
    assert "grpo_fast" not in verl_core().POLICY_LOSS_REGISTRY


@pytest.mark.parametrize(
    "found, words",
    [
        (None, r"verl is not installed: pip install 'verl==0.9.1'"),
        ("0.8.3", "verl 0.8.3 is older than 0.9.1"),
        ("0.10.0", "verl 0.10.0 is newer than 0.9.1"),
    ],
)
def test_a_host_that_is_missing_too_old_or_too_new_is_named(monkeypatch, found, words):
    def version(package):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=words):
        verl.register()


def test_megatron_s_call_is_refused():
    with pytest.raises(ConfigError, match=r"call unregister\(\) for Megatron"):
        verl.linear_cross_entropy(torch.zeros(1, 4), torch.zeros(3, 4), torch.zeros(1), 1.0, "sum")
