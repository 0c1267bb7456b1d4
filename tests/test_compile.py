"""torch.compile sees one operator a public op: the same bits as eager, no graph break, and nothing
compiled again for another length or option."""

import copy
import dataclasses
import inspect
import itertools
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from grpo_fast import (
    GRPOLoss,
    InputError,
    LossConfig,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    token_logprob,
)
from grpo_fast.loss_metrics import metric_names
from grpo_fast.numbered import value_of
from grpo_fast.testing import random_sequences

S, L, D, V = 3, 5, 8, 37
OPS = (linear_grpo_loss, grpo_loss, linear_logprob, token_logprob)
ALL_OPTIONS = LossConfig(loss_type="grpo", beta=0.1, entropy_coef=0.05, epsilon=0.15)


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    counters.clear()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def arguments(op, device="cpu", dtype=torch.float32, *, length=L, seed=2, options=True):
    """(trained tensors by name, the other keywords) of a call that uses most of an op."""
    batch = random_sequences(S, length, D, V, dtype, device, seed=seed)
    if op in (linear_logprob, token_logprob):
        batch["targets"] = batch["targets"].clamp(min=0)
    trained = {"hidden": batch.pop("hidden"), "weight": batch.pop("weight")}
    if op in (grpo_loss, token_logprob):
        trained = {"logits": trained["hidden"] @ trained["weight"].T}
    elif options:
        trained["bias"] = torch.linspace(-1, 1, V, dtype=dtype, device=device)
    others = {"targets": batch["targets"]}
    if op in (linear_grpo_loss, grpo_loss):
        others = batch | {"sampler_logprobs": batch["old_logprobs"] + 0.1}
        others |= {"config": ALL_OPTIONS, "denominator": 7.0} if options else {}
    elif options:
        others |= {"return_entropy": True, "temperature": 0.8}
    return trained, others


def flat(output) -> list[torch.Tensor]:
    """Every tensor of an output, the differentiable ones first."""
    values = [x for x in output if isinstance(x, torch.Tensor)]
    if hasattr(output, "metrics"):
        tokens = [x for x in output.tokens if x is not None]
        return [*values, *tokens, *output.metrics.values()]
    return [*values, output.lse]


def results(
    function, op, device="cpu", dtype=torch.float32, given=None, **kwargs
) -> list[torch.Tensor]:
    """Output and gradients, with another slope for every number that carries one."""
    trained, others = given or arguments(op, device, dtype)
    leaves = {name: x.clone().requires_grad_() for name, x in trained.items()}
    output = function(**leaves, **others | kwargs)
    graded = [x for x in flat(output) if x.requires_grad]
    assert graded
    slopes = [torch.linspace(3.0, 4 + k, x.numel(), dtype=x.dtype) for k, x in enumerate(graded)]
    slopes = [d.to(x.device).view(x.shape) for d, x in zip(slopes, graded, strict=True)]
    torch.autograd.backward(graded, slopes)
    return [*flat(output), *(x.grad for x in leaves.values())]


def assert_same(actual, expected) -> None:
    for k, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad), k
        assert torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0)), (k, a, b)


def caller_of(op):
    """Something to trace around the op."""

    def caller(**kwargs):
        first = next(iter(kwargs))
        return op(**kwargs | {first: kwargs[first] * 2})

    return caller


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_a_compiled_caller_has_the_bits_of_the_eager_one(op, device):
    caller = caller_of(op)
    assert_same(results(compiled(caller), op, device), results(caller, op, device))
    assert counters["graph_break"] == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_gradient_is_rounded_once(dtype, device):
    op = linear_grpo_loss
    assert_same(results(compiled(op), op, device, dtype), results(op, op, device, dtype))


@pytest.mark.parametrize("op", [grpo_loss, linear_logprob], ids=lambda op: op.__name__)
def test_the_reference_compiles_too(op, device):
    expected = results(op, op, device, impl="reference")
    # The factor of 3 is in its chain of products, and after it in a graph.
    actual = results(compiled(op), op, device, impl="reference")
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("op", [linear_grpo_loss, linear_logprob], ids=lambda op: op.__name__)
def test_triton_kernels_in_a_compiled_call(op, device):
    expected = results(op, op, device, impl="triton")
    assert_same(results(compiled(op), op, device, impl="triton"), expected)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles with g++")
def test_inductor(device):
    caller = caller_of(linear_grpo_loss)
    actual = results(compiled(caller, "inductor"), linear_grpo_loss, device)
    assert_same(actual, results(caller, linear_grpo_loss, device))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_opcheck(op, device):
    trained, others = arguments(op, device)
    leaves = {name: x.clone().requires_grad_() for name, x in trained.items()}
    operator = getattr(torch.ops.grpo_fast, op.__name__).default
    if op in (linear_grpo_loss, grpo_loss):
        n_metrics = len(op(**trained, **others).metrics)
        extra = [True] * len(trained), n_metrics
        torch.library.opcheck(operator, (*packed(op, leaves | others), *extra))
        return
    torch.library.opcheck(operator, packed(op, leaves | others))
    values = packed(op, trained | others)
    rows = operator(*values)
    slopes = torch.ones_like(rows[0]), torch.ones_like(rows[2])
    operator = getattr(torch.ops.grpo_fast, f"{op.__name__}_backward").default
    torch.library.opcheck(operator, (*slopes, *rows, [True] * len(trained), *values))


def packed(op, call) -> tuple:
    """The arguments of the operator, as a graph holds them."""
    values = []
    for name, parameter in inspect.signature(op).parameters.items():
        value = call.get(name, parameter.default)
        value = value.number if isinstance(value, LossConfig) else value
        if isinstance(value, float) and name != "logit_scale":
            value = torch.tensor(value, dtype=torch.float64)
        values.append(value)
    return tuple(values)


def test_another_length_config_or_number_compiles_nothing(device):
    def step(hidden, weight, config, **kwargs):
        output = linear_grpo_loss(hidden, weight, config=config, **kwargs)
        return output.loss, output.metrics

    fast = compiled(step)
    for k in range(100):
        trained, others = arguments(linear_grpo_loss, device, length=2 + k, seed=k, options=False)
        config = LossConfig(epsilon=0.1 + k % 20 / 100, entropy_coef=k % 20 / 100)
        others |= {"config": config, "denominator": 5.0 + k, "temperature": 0.5 + k / 100}
        trained["hidden"].requires_grad_()
        loss, metrics = fast(**trained, **others)
        loss.backward()
        if k % 20 == 19:
            expected = step(**trained, **others)
            assert_same([loss, *metrics.values()], [expected[0], *expected[1].values()])
    assert counters["stats"]["unique_graphs"] <= 5


def test_a_module_s_config_may_change(device):
    module = GRPOLoss()
    fast = compiled(module)
    trained, others = arguments(linear_grpo_loss, device, options=False)
    del others["ref_logprobs"]
    losses = []
    for k in range(12):
        module.config = LossConfig(loss_type="sapo", sapo_temperature_pos=1 + k / 10)
        output = fast(**trained, **others)
        losses.append(float(output.loss))
    assert len(set(losses)) == 12
    assert output.tokens.kl is None
    assert counters["stats"]["unique_graphs"] <= 3


class Model(torch.nn.Module):
    """Trunk, head and loss, as a trainer compiles them."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(V, D)
        self.trunk = torch.nn.Linear(D, D)
        self.head = torch.nn.Linear(D, V)
        self.loss = GRPOLoss(LossConfig(loss_type="gspo"), impl="torch")

    def forward(self, ids, targets, advantages, mask):
        hidden = self.trunk(self.embed(ids)).tanh()
        head = {"bias": self.head.bias, "mask": mask}
        output = self.loss(hidden, self.head.weight, targets, advantages, **head)
        return output.loss, output.tokens.gradient_mass


def test_a_compiled_model_with_its_loss(device):
    batch = random_sequences(S, L, D, V, device=device)
    model = Model().to(device)
    found = []
    for run in (model, compiled(model)):
        model.zero_grad()
        names = ("targets", "targets", "advantages", "mask")
        ids, *rest = (batch[name] for name in names)
        loss, mass = run(ids.clamp(min=0), *rest)
        loss.backward()
        found.append([loss.detach(), mass, *(p.grad.clone() for p in model.parameters())])
    assert_same(found[1], found[0])


def test_a_graph_makes_the_gradients_that_are_needed(device):
    trained, others = arguments(linear_grpo_loss, device)
    needed = []

    def backend(graph, inputs):
        (node,) = graph.graph.find_nodes(
            op="call_function", target=torch.ops.grpo_fast.linear_grpo_loss.default
        )
        needed.append(node.args[-2])
        return graph.forward

    fast = compiled(linear_grpo_loss, backend)
    trained["weight"].requires_grad_()
    fast(**trained, **others).loss.backward()
    actual, trained["weight"].grad = trained["weight"].grad, None
    linear_grpo_loss(**trained, **others).loss.backward()
    assert torch.equal(actual, trained["weight"].grad)
    with torch.no_grad():
        assert not fast(**trained, **others).loss.requires_grad
    assert needed == [[False, True, False], [False, False, False]]


def test_packed_rows_and_a_tensor_denominator(device):
    trained, others = arguments(linear_grpo_loss, device)
    trained = {"hidden": trained["hidden"].reshape(-1, D), "weight": trained["weight"]}
    others = {k: v.reshape(-1) if isinstance(v, torch.Tensor) else v for k, v in others.items()}
    others |= {
        "cu_seqlens": torch.arange(S + 1, device=device) * L,
        "denominator": torch.tensor(11.0, device=device),
        "temperature": torch.linspace(0.5, 2, S * L, device=device),
    }
    expected = flat(linear_grpo_loss(**trained, **others))
    assert_same(flat(compiled(linear_grpo_loss)(**trained, **others)), expected)


def test_an_objective_of_ones_own(device):
    def squared(tokens, config):
        return -tokens.ratio.square() * tokens.advantages

    config = LossConfig(objective=squared)
    op = linear_grpo_loss
    actual = results(compiled(op), op, device, config=config)
    assert_same(actual, results(op, op, device, config=config))
    assert not torch.equal(actual[0], results(op, op, device)[0])


def test_a_process_group_goes_by_its_name(tmp_path, device):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group, op = dist.group.WORLD, linear_grpo_loss
        expected = results(op, op, device, process_group=group)
        assert_same(results(compiled(op), op, device, process_group=group), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("op", [linear_grpo_loss, linear_logprob], ids=lambda op: op.__name__)
@pytest.mark.parametrize("wrap", [lambda op: op, compiled], ids=["eager", "compiled"])
def test_autocast_changes_no_bit(wrap, op, device):
    expected = results(op, op, device)
    with torch.autocast(device.type, torch.bfloat16):
        # Forward and backward are in there.
        assert_same(results(wrap(op), op, device), expected)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_autocast_changes_no_bit_of_any_result(impl, op, device):
    trained, others = arguments(op, device)
    expected = flat(op(**trained, **others, impl=impl))
    with torch.autocast(device.type, torch.bfloat16):
        assert_same(flat(op(**trained, **others, impl=impl)), expected)


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
@pytest.mark.parametrize("wrap", [lambda op: op, compiled], ids=["eager", "compiled"])
def test_inference_mode(wrap, loss_type, device):
    trained, others = arguments(linear_grpo_loss, device)
    others["config"] = LossConfig(loss_type=loss_type)
    others["targets"] = others["targets"].clamp(min=0)
    others["mask"] = torch.ones_like(others["mask"])
    for name in ("old", "ref", "sampler"):
        others[f"{name}_logprobs"] = torch.full_like(others["old_logprobs"], -2.0)
    expected = flat(linear_grpo_loss(**trained, **others))
    with torch.inference_mode():
        # What an evaluation has: everything is made in there.
        call = {
            name: x.clone() if isinstance(x, torch.Tensor) else x
            for name, x in (trained | others).items()
        }
        assert_same(flat(wrap(linear_grpo_loss)(**call)), expected)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_function_transforms_are_refused(op, device):
    trained, others = arguments(op, device)
    name, first = next(iter(trained.items()))

    def of(x):
        return op(**trained | {name: x}, **others)[0].sum()

    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(InputError, match=f"{op.__name__} is called inside a torch.func"):
            transform(of)(torch.stack([first, first]))
        if op is linear_grpo_loss:
            with pytest.raises(torch._dynamo.exc.Unsupported, match=r"inside a torch\.func"):
                compiled(transform(of))(torch.stack([first, first]))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_second_derivatives_are_refused(op, device):
    trained, others = arguments(op, device)
    leaves = {name: x.clone().requires_grad_() for name, x in trained.items()}
    first = next(iter(leaves.values()))
    with pytest.raises(InputError, match="create_graph is set"):
        torch.autograd.grad(op(**leaves, **others)[0].sum(), first, create_graph=True)
    loss = compiled(op)(**leaves, **others)[0].sum()
    (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_what_is_wrong_in_a_graph_is_named(device):
    trained, others = arguments(linear_grpo_loss, device)
    fast = compiled(linear_grpo_loss)
    with pytest.raises(InputError, match=r"mask has shape \(3, 4\)"):
        fast(**trained, **others | {"mask": others["mask"][:, 1:]})
    unsupported = torch._dynamo.exc.Unsupported
    moving = others | {"old_logprobs": others["old_logprobs"].clone().requires_grad_()}
    with pytest.raises(unsupported, match="old_logprobs requires grad, expected constants"):
        fast(**trained, **moving)
    with pytest.raises(unsupported, match="takes hidden, weight, targets, advantages"):
        fast(**trained, **others, masks=others["mask"])
    logits, others = arguments(grpo_loss, device)
    with pytest.raises(unsupported, match="inplace is set inside torch.compile"):
        compiled(grpo_loss)(**logits, **others, inplace=True)

    def own_config(**kwargs):
        return grpo_loss(**kwargs | {"config": LossConfig(epsilon=0.123)})

    with pytest.raises(InputError, match="config is made inside torch.compile"):
        compiled(own_config)(**logits, **others)


def test_equal_configs_have_one_number():
    one, other = LossConfig(epsilon=0.11), LossConfig(epsilon=0.12)
    assert one.number == LossConfig(epsilon=0.11).number != other.number
    assert value_of(one.number) == one
    copies = (
        copy.copy(one),
        copy.deepcopy(one),
        pickle.loads(pickle.dumps(one)),
        dataclasses.replace(other, epsilon=0.11),
    )
    for each in copies:
        assert each == one
        assert each.number == one.number
    assert "number" not in dataclasses.asdict(one)
    assert "number" not in repr(one)


def test_an_objective_without_a_hash_has_numbers_too():
    class Objective:
        __hash__ = None

        def __call__(self, tokens, config):
            return -tokens.ratio * tokens.advantages

    first, second = LossConfig(objective=Objective()), LossConfig(objective=Objective())
    assert first.number != second.number
    assert value_of(second.number) is second


def test_metrics_are_known_before_the_data(device):
    configs = (
        LossConfig(),
        LossConfig(loss_type="cispo", epsilon_high=5.0),
        LossConfig(loss_type="gpg"),
    )
    trained, others = arguments(grpo_loss, device)
    empty = {"logits": trained["logits"][:, :0]}
    for config, names in itertools.product(configs, itertools.product((0, 1), repeat=3)):
        given = dict(zip(("old", "ref", "sampler"), map(bool, names), strict=True))
        expected = metric_names(config, **{f"has_{name}": there for name, there in given.items()})
        call = {k: others[k] for k in ("targets", "advantages", "mask")} | {"config": config}
        call |= {f"{k}_logprobs": others[f"{k}_logprobs"] for k, there in given.items() if there}
        metrics = grpo_loss(**trained, **call).metrics
        assert tuple(metrics) == expected
        assert {x.dtype for x in metrics.values()} == {torch.float32}
        call = {
            k: x[:, :0] if isinstance(x, torch.Tensor) and x.dim() == 2 else x
            for k, x in call.items()
        }
        nothing = grpo_loss(**empty, **call).metrics
        assert tuple(nothing) == expected
        assert all(x.isfinite() for x in nothing.values())
        assert float(nothing["ratio/min"]) == float(nothing["ratio/max"]) == 1.0
