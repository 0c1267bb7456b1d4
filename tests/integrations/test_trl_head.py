"""TRL's head function and ours: the same contract, and the same training under every trainer."""

import contextlib
import itertools
import types

import pytest
import torch
from trl_training import MARKS, PROMPTS, answer, assert_same, options_of

from grpo_fast.errors import ConfigError, InputError
from grpo_fast.tiny import tiny_tokenizer

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]
FIELDS = ("logp", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
GRADIENTS = ("dhidden", "dweight", "dbias")
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0, "logit_scale": 0.5, "bias": True, "temperature": 1.3},
}


def ours():
    from grpo_fast.integrations import trl_head

    return trl_head


def functions():
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction, ours().ChunkedLogProb


def rows(n=64, v=300, d=48, dtype=torch.float32, bias=False):
    """Half of the targets likely, a third of the rows without a gradient."""
    source = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, d, generator=source), torch.randn(v, d, generator=source) / 7
    targets = torch.randint(0, v, (n,), generator=source)
    hidden[::2] += 3 * weight[targets[::2]]
    slopes = torch.randn(2, n, generator=source)
    slopes[:, ::3] = 0
    return types.SimpleNamespace(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        bias=torch.randn(v, generator=source).to(dtype) if bias else None,
        targets=targets,
        slopes=slopes,
    )


def measured(function, data, *, temperature=1.0, softcap=None, logit_scale=1.0, autocast=False):
    """Every result of the function and every gradient, by name."""
    given = (data.hidden, data.weight, data.bias)
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in given]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function.apply(*leaves, data.targets, temperature, 128, softcap, logit_scale)
    torch.autograd.backward(out[:2], list(data.slopes))
    found = dict(zip(FIELDS, out, strict=True))
    gradients = zip(GRADIENTS, leaves, strict=True)
    return found | {name: x.grad for name, x in gradients if x is not None}


def exact(data, *, temperature=1.0, softcap=None, logit_scale=1.0, autocast=False):
    """The same in float64, eager."""
    given = (data.hidden, data.weight, data.bias)
    leaves = [None if x is None else x.double().requires_grad_() for x in given]
    logits = torch.nn.functional.linear(*leaves) * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    logp = logits.log_softmax(-1)
    target, entropy = logp.gather(1, data.targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    torch.autograd.backward([target, entropy], list(data.slopes.double()))
    values = (target, entropy, (2 * logp).logsumexp(-1), logits.mean(-1))
    found = dict(zip(FIELDS, (*values, logits.argmax(-1) == data.targets), strict=True))
    gradients = zip(GRADIENTS, leaves, strict=True)
    return found | {name: x.grad for name, x in gradients if x is not None}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_results_and_gradients_are_as_exact_as_trl_s(precision, head):
    options = dict(HEADS[head])
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    data = rows(dtype=dtype, bias=options.pop("bias", False))
    options["autocast"] = precision == "autocast"
    theirs, found = (measured(function, data, **options) for function in functions())
    expected = exact(data, **options)
    assert theirs.keys() == found.keys() == expected.keys()
    # Float32: sums in another order, two units in the last place. Bfloat16 is rounded once here.
    allowed, floor = (2.0, 2**-22) if precision == "float32" else (1.0, 0.0)
    for name, right in expected.items():
        assert found[name].dtype == theirs[name].dtype, name
        assert found[name].shape == theirs[name].shape, name
        if name == "is_top1":
            wrong, wrong_there = ((x[name] != right).sum().item() for x in (found, theirs))
            assert wrong <= wrong_there
            continue
        error, there = ((x[name].double() - right).norm().item() for x in (found, theirs))
        limit = allowed * there + floor * right.norm().item()
        assert error <= limit, f"{name}: {error:.2e} from float64, TRL's is {there:.2e}"


@pytest.mark.parametrize("head", ["plain", "softcap"])
def test_the_kernels_of_a_gpu_score_as_a_cpu_does(monkeypatch, head):
    """Where there is none, in Triton's interpreter."""
    options = dict(HEADS[head])
    data = rows(n=12, v=70, d=16, bias=options.pop("bias", False))
    expected = measured(ours().ChunkedLogProb, data, **options)
    monkeypatch.setattr(ours(), "resolve_impl", lambda impl, tensor: "triton")
    if torch.cuda.is_available():
        moved = {name: x if x is None else x.cuda() for name, x in vars(data).items()}
        data = types.SimpleNamespace(**moved)
    found = measured(ours().ChunkedLogProb, data, **options)
    for name, right in expected.items():
        torch.testing.assert_close(found[name].cpu(), right, rtol=1e-5, atol=1e-6, msg=name)


def test_autocast_multiplies_what_it_would_round():
    """On a GPU that is what makes the products fast."""
    narrow, data = rows(dtype=torch.bfloat16), rows()
    data.hidden = narrow.hidden.float() + 1e-4 * data.hidden
    data.weight = narrow.weight.float()
    apply = ours().ChunkedLogProb.apply
    with torch.autocast("cpu", torch.bfloat16):
        found = apply(data.hidden, data.weight, None, data.targets, 1.0, 128)
    rounded = data.hidden.bfloat16()
    expected = apply(rounded, narrow.weight, None, data.targets, 1.0, 128)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("asked", [(), *((name,) for name in FIELDS[1:])], ids=str)
def test_what_nobody_asked_for_is_none(asked):
    data = rows()
    for function in functions():
        out = function.apply(
            data.hidden, data.weight, None, data.targets, 1.0, 128, None, 1.0, asked
        )
        assert [x is not None for x in out] == [True, *(name in asked for name in FIELDS[1:])]
        assert all(x is None or x.shape == data.targets.shape for x in out)


def test_no_row_gives_no_result_and_gradients_of_zero():
    data = rows(n=0, bias=True)
    for function in functions():
        found = measured(function, data)
        assert all(found[name].shape == (0,) for name in FIELDS)
        assert all(not found[name].any() for name in GRADIENTS)
        assert found["dweight"].shape == data.weight.shape


def test_a_logit_that_an_earlier_token_reaches_is_not_the_first():
    data = rows(n=2, v=8, d=4)
    data.weight[5] = data.weight[3]
    data.hidden[:] = 9 * data.weight[3]
    data.targets[:] = torch.tensor([3, 5])
    for function in functions():
        assert measured(function, data)["is_top1"].tolist() == [True, False]


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)), ids=str)
def test_only_what_is_trained_gets_a_gradient_and_a_lone_output_may_be_used(wanted):
    data = rows()
    for function, output in itertools.product(functions(), range(2)):
        hidden, weight = (
            x.clone().requires_grad_(wish)
            for x, wish in zip((data.hidden, data.weight), wanted, strict=True)
        )
        out = function.apply(hidden, weight, None, data.targets, 1.0, 128)
        assert [x.requires_grad for x in out] == [any(wanted)] * 2 + [False] * 3
        if any(wanted):
            out[output].sum().backward()
        assert [x.grad is not None for x in (hidden, weight)] == list(wanted)


def test_rows_without_a_gradient_enter_no_product(monkeypatch):
    module, data, seen = ours(), rows(), []
    backward = module.logprob_backward

    def spied(dlogp, dentropy, hidden, *more, **options):
        seen.append(len(hidden))
        return backward(dlogp, dentropy, hidden, *more, **options)

    monkeypatch.setattr(module, "logprob_backward", spied)
    measured(module.ChunkedLogProb, data)
    assert seen == [int((data.slopes != 0).any(0).sum())]


def test_a_second_derivative_is_refused():
    data = rows()
    hidden = data.hidden.requires_grad_()
    logp = ours().ChunkedLogProb.apply(hidden, data.weight, None, data.targets, 1.0, 128)[0]
    with pytest.raises(InputError, match="create_graph is set"):
        torch.autograd.grad(logp.sum(), hidden, create_graph=True)


def sharded(weight):
    weight.ds_id = 0
    return weight


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda weight: weight.to(torch.int8), "the output head is quantised (Tensor, torch.int8)"),
        (sharded, "gathered by ZeRO stage 3"),
    ],
    ids=["int8", "zero3"],
)
def test_a_head_that_cannot_be_served_is_an_error(change, words):
    data = rows()
    arguments = (data.hidden, change(data.weight), None, data.targets, 1.0, 128)
    with pytest.raises(ConfigError) as error:
        ours().ChunkedLogProb.apply(*arguments)
    assert words in str(error.value)


@contextlib.contextmanager
def registered():
    ours().register()
    try:
        yield
    finally:
        ours().unregister()


def test_registering_is_undone_and_not_done_twice():
    from trl.trainer import utils

    theirs, mine = functions()
    with registered():
        assert utils._ChunkedLogProbFunction is mine
        with pytest.raises(ConfigError, match=r"call unregister\(\) before registering again"):
            ours().register()
        with ours().exchanged():
            assert utils._ChunkedLogProbFunction is mine
        assert utils._ChunkedLogProbFunction is mine
    assert utils._ChunkedLogProbFunction is theirs
    ours().unregister()
    assert utils._ChunkedLogProbFunction is theirs


def test_another_integration_in_that_place_is_left_there(monkeypatch):
    from trl.trainer import utils

    other = type("Other", (functions()[0],), {"__module__": "elsewhere"})
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", other)
    words = "is already that of elsewhere: undo that integration"
    with pytest.raises(ConfigError, match=words):
        ours().register()
    assert words in ours().why_not()
    assert utils._ChunkedLogProbFunction is other


def test_a_function_with_other_arguments_is_refused(monkeypatch):
    from trl.trainer import utils

    class Longer(torch.autograd.Function):
        __module__ = "trl.kernels"

        @staticmethod
        def forward(ctx, hidden, weight, bias, targets, temperature):
            pass

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Longer)
    with pytest.raises(ConfigError, match="docs/integrations.md"):
        ours().register()
    assert "docs/integrations.md" in ours().why_not()
    with ours().exchanged():
        assert utils._ChunkedLogProbFunction is Longer


ANSWERS = {"completion": ["cd", "12", "abcdef", "9"] * 4}
CHOICES = {"chosen": ["cd", "12", "abcdef", "9"] * 4, "rejected": ["x", "yz", "1", "00000"] * 4}
LABELS = {"label": [True, False, False, True, True, False, True, False] * 2}
GENERATED = {"max_completion_length": 8, "num_generations": 4, "per_device_train_batch_size": 8}
TRAINERS = {
    "SFT": (PROMPTS | ANSWERS, {"max_length": 32}),
    "DPO": (PROMPTS | CHOICES, {"max_length": 32, "loss_type": ["sigmoid"]}),
    # Its gradients are so small that Adam makes steps of what they are rounded by.
    "WPO": (PROMPTS | CHOICES, {"max_length": 32, "use_weighting": True, "learning_rate": 1e-3}),
    "KTO": (PROMPTS | ANSWERS | LABELS, {"max_length": 32}),
    "RLOO": (PROMPTS, GENERATED | {"beta": 0.04}),
    "GRPO": (PROMPTS, GENERATED | {"beta": 0.04, "num_iterations": 2}),
}


def trained(name, model, **more):
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    columns, options = TRAINERS[name]
    host = "DPO" if name == "WPO" else name
    given = {"reward_funcs": answer} if host in ("RLOO", "GRPO") else {}
    config = getattr(trl, f"{host}Config")
    options = options_of(model, **options, **more)
    trainer = getattr(trl, f"{host}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config(**options),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tiny_tokenizer(),
        **given,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_of_trl_trains_as_before(name, model, monkeypatch):
    theirs = trained(name, model)
    seen, score = [], ours()._score

    def spied(*arguments):
        seen.append(arguments[4])
        return score(*arguments)

    monkeypatch.setattr(ours(), "_score", spied)
    with registered():
        found = trained(name, model)
    assert seen, "TRL's own head was used"
    assert_same(theirs, found)
