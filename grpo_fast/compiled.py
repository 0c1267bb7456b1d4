"""The public ops as operators of torch.library: torch.compile and torch.export see one node each.

A graph holds tensors, numbers and strings, and nothing in it is decided by data. So an operator
takes the public arguments, packed as `KINDS` says, and its body runs the eager op on them. What may
change from call to call is a symbol or a tensor of the graph: a length, the number of a config, a
temperature or denominator. So another one compiles nothing. A loss returns the
gradients that its forward makes; log-probs have a second operator for theirs. Eager calls run the
eager op at once.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import gradients_of, linear_logprob_gradients, token_logprob_gradient
from .chunked import Head, LogProbRows
from .errors import InputError
from .implementation import launchers, resolve_impl
from .inputs import check_constant, check_temperature, flat_rows
from .loss_config import LossConfig
from .loss_metrics import metric_names
from .numbered import value_of
from .outputs import LogProbOutput, LossOutput, TokenOutput
from .products import exact_dtype, gradient_dtype
from .vocab_parallel import group_called, is_dtensor, local_shard


class Kind(NamedTuple):
    """How an argument crosses into a graph."""

    schema: str
    pack: Callable[[Any], Any] = lambda value: value
    unpack: Callable[[Any], Any] = lambda value: value


def _as_tensor(value: float | Tensor | None) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    # A sum, because the tracer makes a constant of what a constructor is given.
    return torch.zeros((), dtype=torch.float64, device="cpu") + value


# By the annotation of the public parameter; the Any is `process_group`.
KINDS = {
    Tensor: Kind("Tensor"),
    Tensor | None: Kind("Tensor?"),
    float | Tensor: Kind("Tensor", _as_tensor),
    float | Tensor | None: Kind("Tensor?", _as_tensor),
    float: Kind("float"),
    float | None: Kind("float?"),
    bool: Kind("bool"),
    str: Kind("str"),
    LossConfig: Kind("Tensor", lambda config: _as_tensor(config.number), value_of),
    Any: Kind("str?", lambda group: None if group is None else group.group_name, group_called),
}


@contextmanager
def undisturbed(device: torch.device, *, grad: bool) -> Iterator[None]:
    """Nothing that surrounds a call reaches into it.

    Autocast would round the products of an exact loss. In inference mode, and in the body of an
    operator, autograd is off, which finds the slopes of a loss.
    """
    autocast = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.set_grad_enabled(grad), autocast:
        yield


def autocast_enabled(device: torch.device) -> bool:
    """False on a device that has none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def refuse_transforms(name: str) -> None:
    """InputError inside vmap and its kin, where an op would see one sample of many."""
    if torch._C._are_functorch_transforms_active():
        raise InputError(
            f"{name} is called inside a torch.func transform (vmap, grad, jvp, ...), expected "
            "outside: it makes its own gradient; put samples side by side as rows, and take "
            "gradients with backward() or torch.autograd.grad"
        )


class Operator:
    """One public op, by the signature of its eager function; `trained` arguments have gradients."""

    def __init__(self, eager: Callable, trained: tuple[str, ...]):
        self.eager = eager
        self.trained = trained
        parameters = inspect.signature(eager).parameters
        self.kinds = {name: KINDS[each.annotation] for name, each in parameters.items()}
        self.defaults = {name: each.default for name, each in parameters.items()}
        self.required = [n for n, each in parameters.items() if each.default is each.empty]
        self.arguments = ", ".join(f"{kind.schema} {name}" for name, kind in self.kinds.items())

    def define(self, name: str, schema: str, body: Callable, fake: Callable):
        """An operator of torch.library."""
        operator = torch.library.custom_op(
            f"grpo_fast::{name}",
            body,
            mutates_args=(),
            schema=schema,
            # Which rows are live is read on the host.
            tags=(torch.Tag.cudagraph_unsafe,),
        )
        operator.register_fake(fake)
        return operator

    def public(self) -> Callable:
        """The op as callers have it: eager, or in a graph its operator."""

        @functools.wraps(self.eager)
        def call(*args, **kwargs):
            refuse_transforms(self.eager.__name__)
            if torch.compiler.is_compiling():
                return self.traced(self.bound(args, kwargs))
            given = (*args, *kwargs.values())
            device = next((x.device for x in given if isinstance(x, Tensor)), torch.device("cpu"))
            if torch.is_inference_mode_enabled() or autocast_enabled(device):
                with undisturbed(device, grad=torch.is_grad_enabled()):
                    return self.eager(*args, **kwargs)
            return self.eager(*args, **kwargs)

        return call

    def bound(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Every argument by name. `inspect` can do that too, but not in every graph."""
        # Positional arguments are those without a default.
        given = dict(zip(self.required, args, strict=False)) | kwargs
        call = self.defaults | given
        missing = [name for name in self.required if name not in given]
        if missing or len(call) > len(self.kinds) or len(given) < len(args) + len(kwargs):
            raise TypeError(
                f"{self.eager.__name__}() takes {', '.join(self.required)} and then keywords "
                f"{', '.join(self.kinds)}; got {len(args)} positional and {', '.join(kwargs)}"
            )
        return call

    def traced(self, call: dict[str, Any]) -> tuple:
        """The public op as a tracer reads it."""
        raise NotImplementedError

    def pack(self, call: dict[str, Any]) -> list:
        return [kind.pack(call[name]) for name, kind in self.kinds.items()]

    def named(self, values: Sequence) -> dict[str, Any]:
        """Packed arguments by name."""
        return dict(zip(self.kinds, values, strict=True))

    def unpack(self, values: Sequence) -> dict[str, Any]:
        return {name: self.kinds[name].unpack(value) for name, value in self.named(values).items()}

    def chosen(self, needed: Sequence[bool]) -> list[str]:
        return [name for name, need in zip(self.trained, needed, strict=True) if need]

    def leaves(self, call: dict[str, Any], needed: Sequence[bool]) -> dict[str, Tensor]:
        """In place of the arguments that need a gradient: leaves of a graph of their own."""
        return {name: call[name].detach().requires_grad_() for name in self.chosen(needed)}

    def gradient_dtype(self, call: dict[str, Any], name: str) -> torch.dtype:
        return call[name].dtype

    def gradients(
        self, call: dict[str, Any], needed: Sequence[bool], made: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """One contiguous tensor a trained argument, empty where not needed."""
        made = iter(made)
        for name, need in zip(self.trained, needed, strict=True):
            if need:
                kind = self.gradient_dtype(call, name)
                yield next(made).reshape(call[name].shape).contiguous().to(kind)
            else:
                yield call[self.trained[0]].new_empty(0)

    def fake_gradients(self, call: dict[str, Any], needed: Sequence[bool]) -> Iterator[Tensor]:
        for name, need in zip(self.trained, needed, strict=True):
            if need:
                yield call[name].new_empty(call[name].shape, dtype=self.gradient_dtype(call, name))
            else:
                yield call[self.trained[0]].new_empty(0)


class LossOperator(Operator):
    """`(arguments, needed, n_metrics) -> (loss, logprobs, entropy, ratio, kl, mass, slope,
    first_bad, metrics, one gradient a trained argument)`, the gradients of the loss itself."""

    def __init__(self, eager: Callable, trained: tuple[str, ...]):
        super().__init__(eager, trained)
        results = ", ".join(["Tensor"] * (9 + len(trained)))
        schema = f"({self.arguments}, bool[] needed, int n_metrics) -> ({results})"
        self.operator = self.define(eager.__name__, schema, self.body, self.fake)
        self.operator.register_autograd(self.backward, setup_context=self.setup)

    def traced(self, call: dict[str, Any]) -> LossOutput:
        if call.get("inplace"):
            raise InputError(
                "inplace is set inside torch.compile, expected outside: a graph plans its memory "
                "itself, leave inplace out"
            )
        for name in ("advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs"):
            check_constant(name, call[name])
        if is_dtensor(call.get("weight")):
            shard = local_shard(call["weight"], call["bias"], call["process_group"])
            call["weight"], call["bias"], call["process_group"] = shard
        trained = [call[name] for name in self.trained]
        grad = torch.is_grad_enabled()
        needed = [grad and x is not None and x.requires_grad for x in trained]
        names = metric_names(
            call["config"],
            has_old=call["old_logprobs"] is not None,
            has_ref=call["ref_logprobs"] is not None,
            has_sampler=call["sampler_logprobs"] is not None,
        )
        results = self.operator(*self.pack(call), needed, len(names))
        loss, logprobs, entropy, ratio, kl, mass, slope, first_bad, metrics = results[:9]
        by_name = dict(zip(names, metrics.unbind(), strict=True))
        output = LossOutput(loss, logprobs, entropy, by_name)
        kl = None if call["ref_logprobs"] is None else kl
        output.tokens = TokenOutput(ratio, kl, mass, slope, first_bad)
        return output

    def body(self, *values):
        *values, needed, _ = values
        call = self.unpack(values)
        first = call[self.trained[0]]
        leaves = self.leaves(call, needed)
        with undisturbed(first.device, grad=any(needed)):
            output = self.eager(**call | leaves)
            made = gradients_of(output.loss, tuple(leaves.values()))
        ratio, kl, mass, slope, first_bad = output.tokens
        return (
            output.loss.detach(),
            output.logprobs,
            output.entropy,
            ratio,
            first.new_empty(0) if kl is None else kl,
            mass,
            slope,
            first_bad,
            torch.stack(tuple(output.metrics.values())),
            *self.gradients(call, needed, made),
        )

    def fake(self, *values):
        *values, needed, n_metrics = values
        call = self.named(values)
        first, shape = call[self.trained[0]], call["targets"].shape
        exact = exact_dtype(first)
        no_kl = call["ref_logprobs"] is None
        return (
            first.new_empty((), dtype=exact),
            first.new_empty(shape, dtype=exact),
            first.new_empty(shape, dtype=exact),
            first.new_empty(shape, dtype=exact),
            first.new_empty(0) if no_kl else first.new_empty(shape, dtype=exact),
            first.new_empty(shape, dtype=exact),
            first.new_empty(shape, dtype=exact),
            first.new_empty((), dtype=torch.int64),
            first.new_empty(n_metrics, dtype=torch.float32),
            *self.fake_gradients(call, needed),
        )

    def gradient_dtype(self, call: dict[str, Any], name: str) -> torch.dtype:
        first = call[self.trained[0]]
        return first.dtype if name == "logits" else gradient_dtype(call[name], first)

    def setup(self, ctx, inputs, output):
        *values, needed, _ = inputs
        call = self.named(values)
        ctx.dtypes = {name: call[name].dtype for name in self.chosen(needed)}
        ctx.save_for_backward(*output[9:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(self, ctx, dloss, *_):
        gradients = dict.fromkeys(self.kinds)
        for name, made in zip(self.trained, ctx.saved_tensors, strict=True):
            if name in ctx.dtypes and dloss is not None:
                gradients[name] = (made * dloss).to(ctx.dtypes[name])
        return *gradients.values(), None, None


class LogProbOperator(Operator):
    """`(arguments) -> (logprobs, lse, entropy)`, and `(dlogprobs, dentropy, logprobs, lse, entropy,
    needed, arguments) -> one gradient a trained argument`."""

    def __init__(self, eager: Callable, trained: tuple[str, ...]):
        super().__init__(eager, trained)
        name, given = eager.__name__, self.arguments
        schema = f"({given}) -> (Tensor, Tensor, Tensor)"
        self.operator = self.define(name, schema, self.body, self.fake)
        self.operator.register_autograd(self.backward, setup_context=self.setup)
        rows = "Tensor? dlogprobs, Tensor? dentropy, Tensor logprobs, Tensor lse, Tensor entropy"
        schema = f"({rows}, bool[] needed, {given}) -> Tensor[]"
        self.backward_operator = self.define(
            f"{name}_backward", schema, self.backward_body, self.backward_fake
        )

    def traced(self, call: dict[str, Any]) -> LogProbOutput:
        logprobs, lse, entropy = self.operator(*self.pack(call))
        output = LogProbOutput(logprobs, entropy if call["return_entropy"] else None)
        output.lse = lse
        return output

    def body(self, *values):
        call = self.unpack(values)
        first = call[self.trained[0]]
        with undisturbed(first.device, grad=False):
            output = self.eager(**call)
        entropy = first.new_empty(0) if output.entropy is None else output.entropy
        return output.logprobs, output.lse, entropy

    def fake(self, *values):
        call = self.named(values)
        first, shape = call[self.trained[0]], call["targets"].shape
        exact = exact_dtype(first)
        asked = call["return_entropy"]
        return (
            first.new_empty(shape, dtype=exact),
            first.new_empty(shape, dtype=exact),
            first.new_empty(shape, dtype=exact) if asked else first.new_empty(0),
        )

    def setup(self, ctx, inputs, output):
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *output)
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(self, ctx, dlogprobs, _, dentropy):
        *tensors, logprobs, lse, entropy = ctx.saved_tensors
        values = [y if x is None else x for x, y in zip(tensors, ctx.others, strict=True)]
        needs = dict(zip(self.kinds, ctx.needs_input_grad, strict=True))
        needed = [needs[name] for name in self.trained]
        made = self.backward_operator(dlogprobs, dentropy, logprobs, lse, entropy, needed, *values)
        gradients = dict.fromkeys(self.kinds) | dict(zip(self.trained, made, strict=True))
        return tuple(gradients[name] if needs[name] else None for name in self.kinds)

    def backward_body(self, dlogprobs, dentropy, logprobs, lse, entropy, needed, *values):
        call = self.unpack(values)
        first = call[self.trained[0]]
        if call["impl"] == "reference":
            leaves = self.leaves(call, needed)
            with undisturbed(first.device, grad=True):
                output = self.eager(**call | leaves)
                pairs = zip(output, (dlogprobs, dentropy), strict=True)
                results, slopes = zip(*((y, d) for y, d in pairs if d is not None), strict=True)
                made = torch.autograd.grad(results, tuple(leaves.values()), slopes)
            return list(self.gradients(call, needed, made))
        entropy = entropy if call["return_entropy"] else None
        per_row = (dlogprobs, dentropy, logprobs, lse, entropy)
        dlogp, dentropy, *rows = (None if x is None else x.reshape(-1) for x in per_row)
        arguments = (call["targets"].reshape(-1), LogProbRows(*rows))
        options = {
            "temperature": check_temperature(call["temperature"], call["targets"]),
            "kernels": launchers(resolve_impl(call["impl"], first)),
        }
        if "weight" not in call:
            made = token_logprob_gradient(dlogp, dentropy, flat_rows(first), *arguments, **options)
            return list(self.gradients(call, needed, (made,)))
        head = Head(call["weight"], call["bias"], call["logit_scale"], call["softcap"])
        arguments = (flat_rows(first), head, *arguments)
        made = linear_logprob_gradients(dlogp, dentropy, *arguments, needed=needed, **options)
        return list(self.gradients(call, needed, [x for x in made if x is not None]))

    def backward_fake(self, dlogprobs, dentropy, logprobs, lse, entropy, needed, *values):
        return list(self.fake_gradients(self.named(values), needed))


def loss_op(*trained: str) -> Callable[[Callable], Callable]:
    """Decorator of a public loss with gradients in these arguments, the hidden states first."""
    return lambda eager: LossOperator(eager, trained).public()


def logprob_op(*trained: str) -> Callable[[Callable], Callable]:
    """Decorator of public log-probs, likewise."""
    return lambda eager: LogProbOperator(eager, trained).public()
