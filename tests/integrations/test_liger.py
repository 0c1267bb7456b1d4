"""The module with Liger's signature against Liger's own: loss, gradients and metrics, option by
option, and what Liger gets wrong without a word."""

import inspect
import itertools
import re

import pytest
import torch
from torch import Tensor

from grpo_bench.hosts import even_batch, random_batch
from grpo_fast.errors import ConfigError, InputError
from grpo_fast.integrations import liger
from grpo_fast.integrations.liger import LigerFusedLinearGRPOLoss

# Liger computes in float32 whatever it is given.
LIMIT = 2e-6
LOSSES = {
    "grpo": {},
    "bnpo": {},
    "dapo": {},
    "dr_grpo": {"max_completion_length": 16},
    "cispo": {"epsilon_high": 1.5},
    "sapo": {"sapo_temperature_pos": 2.0},
    "vespo": {"vespo_k_neg": 1.0, "vespo_lambda_pos": 2.0},
    "luspo": {},
}
LEVELS = {
    name: ("token",) if name in ("cispo", "sapo", "vespo") else ("token", "sequence")
    for name in LOSSES
}
REFERENCES = ("none", "logps", "input")
CASES = [
    (name, level, bias, reference)
    for name in LOSSES
    for level, bias, reference in itertools.product(LEVELS[name], (False, True), REFERENCES)
    # With a KL, or by token, Liger's luspo counts padding: its own test is below.
    if name != "luspo" or (level, reference) == ("sequence", "none")
]


def inputs(loss_type: str = "grpo", *, bias: bool = False, reference: str = "none") -> dict:
    """Arguments of both, in float32; ids under the mask are -100, as Liger tolerates."""
    # The product of a sequence's ratios is what VESPO looks at: it must stay near 1.
    batch = random_batch(old_gap=0.3 if loss_type == "vespo" else 0.9)
    mask = batch["mask"]
    generator = torch.Generator().manual_seed(1)

    def normal(like: Tensor) -> Tensor:
        return 0.3 * torch.randn(like.shape, generator=generator)

    given = {
        "_input": batch["hidden"].float(),
        "lin_weight": batch["weight"].float(),
        "selected_token_ids": batch["targets"],
        "attention_mask": mask.float(),
        "advantages": batch["advantages"].float(),
        "old_per_token_logps": batch["old_logprobs"].float().masked_fill(~mask, 0.0),
    }
    if bias:
        given["bias"] = normal(batch["weight"][:, 0])
    if reference == "logps":
        given["ref_per_token_logps"] = batch["ref_logprobs"].float().masked_fill(~mask, 0.0)
    if reference == "input":
        given["ref_input"] = given["_input"] + normal(given["_input"])
        given["ref_weight"] = given["lin_weight"] + normal(given["lin_weight"])
        given["ref_bias"] = given.get("bias")
    return given


def run(cls, given: dict, **options):
    """(loss, metrics, gradients)."""
    leaves = {
        name: given[name].clone().requires_grad_()
        for name in ("_input", "lin_weight", "bias")
        if given.get(name) is not None
    }
    loss, metrics = cls(compiled=False, **options)(**given | leaves)
    return (
        loss,
        metrics,
        dict(zip(leaves, torch.autograd.grad(loss, tuple(leaves.values())), strict=True)),
    )


def theirs():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Liger

    return Liger


def assert_same(given: dict, **options):
    here, there = run(LigerFusedLinearGRPOLoss, given, **options), run(theirs(), given, **options)
    assert float(here[0].detach() - there[0].detach()) == pytest.approx(0.0, abs=LIMIT)
    assert len(here[1]) == len(there[1])
    for ours, other in zip(here[1], there[1], strict=True):
        assert float(ours) == pytest.approx(float(other), rel=1e-5, abs=LIMIT)
    for name, gradient in there[2].items():
        gap = (here[2][name] - gradient).abs().max() / gradient.abs().max()
        assert float(gap) <= LIMIT, name
    return here


@pytest.mark.host
@pytest.mark.parametrize("name, level, bias, reference", CASES)
def test_loss_gradients_and_metrics_are_liger_s(name, level, bias, reference):
    options = LOSSES[name] | {"loss_type": name, "importance_sampling_level": level}
    options |= {"beta": 0.0 if reference == "none" else 0.1, "temperature": 0.7}
    options["use_ref_model"] = reference != "none"
    given = inputs(name, bias=bias, reference=reference)
    if level == "sequence":
        # A mean over the sequence stays near 1, and on the side where no clip holds it.
        options |= {"epsilon_low": 0.2, "epsilon_high": 0.15}
        given["advantages"] = -given["advantages"]
    loss, metrics, _ = assert_same(given, **options)
    assert loss.requires_grad
    # A metric that is 0 everywhere would show nothing.
    assert name in ("sapo", "vespo") or float(metrics[-1]) > 0
    assert len(metrics) == (2 if options["beta"] else 1)


@pytest.mark.host
@pytest.mark.parametrize(
    "options",
    [
        {"delta": 1.5},
        {"epsilon_low": 0.1, "epsilon_high": 0.28},
        {"beta": 0.1, "use_bias_correction_kl": True},
        {"beta": 0.1, "use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
        {"beta": 0.1, "loss_type": "sapo", "use_bias_correction_kl": True},
    ],
    ids=str,
)
def test_the_other_options_are_liger_s(options):
    options = {"beta": 0.0, "loss_type": "grpo", **options}
    options["use_ref_model"] = options["beta"] > 0
    given = inputs(reference="logps" if options["beta"] else "none")
    with_it = assert_same(given, **options)
    plain = {"loss_type": options["loss_type"], "beta": options["beta"]}
    plain["use_ref_model"] = options["use_ref_model"]
    assert float(run(theirs(), given, **plain)[0]) != pytest.approx(float(with_it[0]), abs=1e-5)


@pytest.mark.host
@pytest.mark.parametrize("name", ["dapo", "cispo", "vespo", "grpo"])
@pytest.mark.parametrize("items", [None, 1000, torch.tensor(77)], ids=str)
def test_num_items_in_batch_is_what_dapo_cispo_and_vespo_divide_by(name, items):
    options = LOSSES[name] | {"loss_type": name, "beta": 0.0, "use_ref_model": False}
    assert_same(inputs(name) | {"num_items_in_batch": items}, **options)


@pytest.mark.host
@pytest.mark.parametrize("name", LOSSES.keys() - {"luspo"})
@pytest.mark.parametrize("shape", ["S", "S 1", "S L", "0 too"])
def test_the_weight_of_the_sampler_is_liger_s(name, shape):
    given = inputs(name, reference="logps")
    sequences, length = given["attention_mask"].shape
    size = {"S": (sequences,), "S 1": (sequences, 1)}.get(shape, (sequences, length))
    ratio = torch.rand(size, generator=torch.Generator().manual_seed(2)) + 0.5
    if shape == "0 too":
        ratio[:, ::3] = 0.0
    if len(size) == 2 and size[1] > 1:
        # Liger's vespo multiplies what stands under the mask too.
        ratio = ratio.masked_fill(given["attention_mask"] == 0, 1.0)
    options = LOSSES[name] | {"loss_type": name, "beta": 0.1}
    assert_same(given | {"vllm_is_ratio": ratio}, **options)


def vespo_in_float64(given: dict, ratio: Tensor, *, k: tuple, lam: tuple) -> tuple[Tensor, Tensor]:
    """VESPO's loss, mean of all live tokens, and its gradient in the hidden states, a sequence at a
    time without what is under the mask; k and lam for a positive and a negative advantage."""
    hidden = given["_input"].double().requires_grad_()
    log_p = (hidden @ given["lin_weight"].double().T).log_softmax(-1)
    total, mask = 0.0, given["attention_mask"].bool()
    for s, live in enumerate(mask):
        ids, advantage = given["selected_token_ids"][s, live], given["advantages"][s].double()
        logp = log_p[s, live].gather(-1, ids[:, None])[:, 0]
        log_ratio = logp.detach() - given["old_per_token_logps"][s, live].double()
        log_w = (log_ratio + ratio[s, live].double().log()).sum()
        side = int(advantage < 0)
        phi = (lam[side] + k[side] * log_w - lam[side] * log_w.exp()).exp()
        total = total - phi * advantage * logp.sum()
    loss = total / mask.sum()
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@pytest.mark.host
@pytest.mark.parametrize("padding", [1.0, 0.0, 7.0, float("inf"), float("nan")])
def test_the_sampler_s_weight_under_the_mask_is_no_part_of_vespo(padding):
    """Liger multiplies it to the weight of the sequence, so that all but 1 is another loss."""
    given = inputs("vespo")
    mask = given["attention_mask"].bool()
    ratio = torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)) + 0.5
    ratio = ratio.masked_fill(~mask, padding)
    options = {"loss_type": "vespo", "beta": 0.0, "use_ref_model": False}
    given["vllm_is_ratio"] = ratio
    loss, _, gradients = run(LigerFusedLinearGRPOLoss, given, **options)
    right, slope = vespo_in_float64(given, ratio, k=(2.0, 3.0), lam=(3.0, 2.0))
    assert float(loss.detach()) == pytest.approx(float(right), abs=LIMIT)
    assert float((gradients["_input"] - slope).abs().max() / slope.abs().max()) <= LIMIT
    there = run(theirs(), given, **options)[0].detach()
    assert (abs(float(there) - float(right)) < LIMIT) == (padding == 1.0)


@pytest.mark.host
@pytest.mark.parametrize("size", [(6,), (6, 9)], ids=str)
def test_vespo_on_policy_still_has_the_sampler_s_weight(size):
    given = inputs("vespo")
    ratio = torch.rand(size, generator=torch.Generator().manual_seed(2)) + 0.5
    if len(size) == 2:
        ratio = ratio.masked_fill(given["attention_mask"] == 0, 1.0)
    given |= {"vllm_is_ratio": ratio, "old_per_token_logps": None}
    assert_same(given, loss_type="vespo", beta=0.0, use_ref_model=False, temperature=0.7)


@pytest.mark.host
def test_of_two_references_the_log_probs_are_read_and_that_is_said():
    given = inputs(reference="logps")
    alone = run(LigerFusedLinearGRPOLoss, given)[0]
    two = given | {"ref_input": 2 * given["_input"], "ref_weight": given["lin_weight"]}
    with pytest.warns(UserWarning, match="Using ref_per_token_logps"):
        assert torch.equal(run(LigerFusedLinearGRPOLoss, two)[0], alone)


@pytest.mark.host
def test_on_policy_without_old_log_probs_and_with_a_frozen_head():
    given = inputs()
    del given["old_per_token_logps"]
    loss, metrics, _ = assert_same(given, beta=0.0, loss_type="dapo", use_ref_model=False)
    assert float(metrics[0]) == 0.0
    frozen = LigerFusedLinearGRPOLoss(beta=0.0)
    hidden = given.pop("_input").requires_grad_()
    assert torch.equal(frozen(hidden, **given)[0], loss)
    assert given["lin_weight"].grad is None


@pytest.mark.host
@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_advantages_per_token_are_right_whatever_chunk_size_is(chunk_size):
    """Liger multiplies the loss by chunk_size."""
    given = inputs()
    per_token = given["advantages"][:, None].expand_as(given["attention_mask"]).contiguous()
    options = {"beta": 0.0, "loss_type": "grpo", "use_ref_model": False, "chunk_size": chunk_size}
    here = run(LigerFusedLinearGRPOLoss, given | {"advantages": per_token}, **options)
    right = run(theirs(), given, **options)
    there = run(theirs(), given | {"advantages": per_token}, **options)
    assert float(here[0]) == pytest.approx(float(right[0]), abs=LIMIT)
    assert (abs(float(there[0] - right[0])) > 1e-3) == (chunk_size > 1)


@pytest.mark.host
def test_luspo_does_not_count_padding():
    """Liger's does, by token or with a KL."""
    options = {"loss_type": "luspo", "beta": 0.0, "use_ref_model": False}
    losses = []
    for width in (1, 2):
        batch = even_batch((1,), (1.0,), width=width)
        given = {
            "_input": batch["hidden"].float(),
            "lin_weight": batch["weight"].float(),
            "selected_token_ids": batch["targets"],
            "attention_mask": batch["mask"].float(),
            "advantages": batch["advantages"].float(),
            "old_per_token_logps": batch["old_logprobs"].float() * batch["mask"],
        }
        losses.append(
            (run(LigerFusedLinearGRPOLoss, given, **options)[0], run(theirs(), given, **options)[0])
        )
    assert float(losses[0][0]) == pytest.approx(float(losses[0][1]))
    assert float(losses[0][0]) == pytest.approx(float(losses[1][0]))
    assert abs(float(losses[0][1] - losses[1][1])) > 0.1


@pytest.mark.host
def test_both_signatures_are_liger_s():
    for method in ("__init__", "forward"):
        pairs = []
        for cls in (LigerFusedLinearGRPOLoss, theirs()):
            signature = inspect.signature(getattr(cls, method))
            pairs.append([(p.name, p.default) for p in signature.parameters.values()])
        assert pairs[0] == pairs[1]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"beta": 0.1, "use_ref_model": False}, "beta = 0.1: no effect"),
        ({"loss_type": "cispo", "epsilon_high": 0.3}, "0.3 is the largest ratio"),
        ({"loss_type": "cispo", "epsilon_low": 0.3, "epsilon_high": 2.0}, "epsilon_low = 0.3: no"),
        ({"loss_type": "sapo", "epsilon_high": 0.28}, "epsilon_high = 0.28: no effect"),
        ({"loss_type": "sapo", "delta": 2.0}, "delta = 2.0: no effect"),
        ({"loss_type": "grpo", "sapo_temperature_pos": 2.0}, "sapo_temperature_pos = 2.0: no"),
        (
            {"beta": 0.0, "use_ref_model": False, "use_bias_correction_kl": True},
            "use_bias_correction_kl = True: no effect",
        ),
    ],
    ids=str,
)
def test_what_liger_ignores_is_ignored_with_a_warning(options, words):
    with pytest.warns(UserWarning, match=re.escape(words)) as said:
        loss = LigerFusedLinearGRPOLoss(**options)
    assert len(said) == 1
    assert said[0].filename == __file__
    given = inputs()
    needed = {"ref_per_token_logps": given["old_per_token_logps"] - 0.1} if loss.config.beta else {}
    ours, kept = loss(**given, **needed)
    expected, theirs_kept = theirs()(**options, compiled=False)(**given, **needed)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)
    assert len(kept) == len(theirs_kept)
    for found, right in zip(kept, theirs_kept, strict=True):
        torch.testing.assert_close(found, torch.as_tensor(right), rtol=2e-6, atol=2e-6)


def test_options_that_are_read_need_no_warning(recwarn):
    for options in ({}, {"loss_type": "sapo"}, {"loss_type": "cispo", "epsilon_high": 5.0}):
        LigerFusedLinearGRPOLoss(**options)
    assert not recwarn.list


@pytest.mark.parametrize(
    "options, words",
    [
        ({"loss_type": "dr_grpo"}, "divides by max_completion_length: set it"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "leave it out"),
        ({"loss_type": "gpro"}, "did you mean 'grpo'"),
    ],
    ids=str,
)
def test_what_liger_cannot_do_either_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        LigerFusedLinearGRPOLoss(**options)


@pytest.mark.parametrize(
    "options, more, words",
    [
        ({"beta": 0.1}, {}, "needs a reference: pass ref_per_token_logps"),
        ({"beta": 0.0}, {"vllm_is_ratio": torch.ones(5)}, "vllm_is_ratio has shape (5,)"),
    ],
    ids=str,
)
def test_what_a_call_lacks_is_named(options, more, words):
    with pytest.raises((ConfigError, InputError), match=re.escape(words)):
        LigerFusedLinearGRPOLoss(**options)(**inputs() | more)


def test_several_processes_need_the_tokens_of_the_step(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    given = inputs()
    loss = LigerFusedLinearGRPOLoss(beta=0.0)
    with pytest.raises(ConfigError, match="on 4 processes: pass num_items_in_batch"):
        loss(**given)
    whole = loss(**given, num_items_in_batch=400)[0]
    monkeypatch.undo()
    assert torch.equal(whole, loss(**given, num_items_in_batch=100)[0])


@pytest.mark.host
def test_register_exchanges_the_class_everywhere_and_unregister_puts_it_back(monkeypatch):
    import sys
    import types

    import liger_kernel.chunked_loss as package

    before = theirs()
    trainer = types.ModuleType("a_trainer")
    trainer.LigerFusedLinearGRPOLoss = before
    monkeypatch.setitem(sys.modules, "a_trainer", trainer)
    liger.register()
    try:
        assert package.LigerFusedLinearGRPOLoss is LigerFusedLinearGRPOLoss
        assert package.grpo_loss.LigerFusedLinearGRPOLoss is LigerFusedLinearGRPOLoss
        assert trainer.LigerFusedLinearGRPOLoss is LigerFusedLinearGRPOLoss
        with pytest.raises(ConfigError, match=r"liger-kernel already: call unregister\(\)"):
            liger.register()
    finally:
        liger.unregister()
    assert package.LigerFusedLinearGRPOLoss is trainer.LigerFusedLinearGRPOLoss is before
    liger.unregister()
    assert theirs() is before
