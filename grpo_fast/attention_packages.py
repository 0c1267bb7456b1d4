"""flash-attn 2, 3 and 4, where one is installed: their varlen functions below autograd, whose
backward takes any out and lse.

Arguments go by name, so that another order cannot hurt, and a version with other names is refused
before its first call.

Shapes: q, out [Hq, Tq, d], k, v [Hk, Tk, d], lse [Hq, Tq]; the packages want tokens first.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .attention_backends import LEAST_QUERIES, Scoring
from .layout import Spans

Arguments = dict[str, Any]


class FlashAttn:
    """What the three have in common, which is nearly everything."""

    package: ClassVar[str]
    module: ClassVar[str]
    names: ClassVar[tuple[str, str]]
    """Of the functions of the two calls."""
    forward_only: ClassVar[Arguments] = {}
    backward_only: ClassVar[Arguments] = {}
    renamed: ClassVar[dict[str, str]] = {}
    """Arguments of the backward, where its names differ."""
    no_window: ClassVar[int | None] = -1

    @classmethod
    def functions(cls) -> tuple[Callable, Callable]:
        module = importlib.import_module(cls.module)
        forward, backward = cls.names
        return getattr(module, forward), getattr(module, backward)

    @classmethod
    def problem(cls) -> str | None:
        """Why this package cannot be used here, or None."""
        try:
            functions = cls.functions()
        except (ImportError, AttributeError) as error:
            return f"it needs the package {cls.package} ({error})"
        nothing = torch.empty(0)
        spans, scoring = Spans.of([1], [1], nothing.device), Scoring(1.0, True)
        ours = (
            cls.forward_arguments(*[nothing] * 3, spans, scoring),
            cls.backward_arguments(*[nothing] * 9, spans, scoring),
        )
        for name, function, arguments in zip(cls.names, functions, ours, strict=True):
            # A custom op hides its arguments behind a call that takes anything.
            function = getattr(function, "_init_fn", function)
            try:
                inspect.signature(function).bind(**arguments)
            except TypeError as error:
                return (
                    f"{cls.module}.{name} takes other arguments than {cls.package} does ({error})"
                )
        return None

    @classmethod
    def shared_arguments(cls, spans: Spans, scoring: Scoring) -> Arguments:
        left, right = cls.no_window, cls.no_window
        if scoring.window is not None:
            left, right = scoring.window - 1, 0
        return {
            "cu_seqlens_q": spans.cu_queries,
            "cu_seqlens_k": spans.cu_keys,
            "max_seqlen_q": max(spans.longest_query, LEAST_QUERIES),
            "max_seqlen_k": spans.longest_key,
            "softmax_scale": scoring.scale,
            "causal": scoring.causal,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": scoring.softcap or 0.0,
        }

    @classmethod
    def forward_arguments(
        cls, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scoring: Scoring
    ) -> Arguments:
        given = {"q": q, "k": k, "v": v} | cls.shared_arguments(spans, scoring)
        return given | cls.forward_only

    @classmethod
    def backward_arguments(
        cls,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        spans: Spans,
        scoring: Scoring,
    ) -> Arguments:
        given = {"dout": grad, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}
        given |= {"dq": dq, "dk": dk, "dv": dv} | cls.shared_arguments(spans, scoring)
        given["deterministic"] = torch.are_deterministic_algorithms_enabled()
        return {cls.renamed.get(name, name): x for name, x in given.items()} | cls.backward_only

    def forward(self, q, k, v, spans, scoring):
        attend, _ = self.functions()
        tokens = [x.transpose(0, 1) for x in (q, k, v)]
        # Random state, blocks of a split: what follows depends on the version.
        out, lse, *_ = attend(**self.forward_arguments(*tokens, spans, scoring))
        return out.transpose(0, 1), lse

    def backward(self, grad, q, k, v, out, lse, spans, scoring):
        _, differentiate = self.functions()
        grad, *tokens = (x.transpose(0, 1) for x in (grad, q, k, v, out))
        # The gradient of a sum has strides of 0, which copies by hardware refuse.
        grad = grad.contiguous()
        # Keys that no query looks at keep this 0, should a kernel pass them over.
        found = [torch.zeros_like(x) for x in tokens[:3]]
        differentiate(
            **self.backward_arguments(grad, *tokens, lse.contiguous(), *found, spans, scoring)
        )
        return tuple(x.transpose(0, 1) for x in found)


class FlashAttn2(FlashAttn):
    """Ampere and newer; softcap and windows."""

    package = "flash-attn 2.7 or 2.8"
    module = "flash_attn.flash_attn_interface"
    names = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
    forward_only: ClassVar = {"dropout_p": 0.0}
    backward_only: ClassVar = {"dropout_p": 0.0, "alibi_slopes": None}


class FlashAttn3(FlashAttn):
    """Hopper; softcap and windows."""

    package = "flash-attn-3"
    module = "flash_attn_interface"
    names = ("_flash_attn_forward", "_flash_attn_backward")
    renamed: ClassVar = {"causal": "is_causal"}


class FlashAttn4(FlashAttn):
    """Hopper and Blackwell, compiled when first called; softcap and windows."""

    package = "flash-attn-4"
    module = "flash_attn.cute.interface"
    names = ("_flash_attn_fwd", "_flash_attn_bwd")
    forward_only: ClassVar = {"return_lse": True}
    renamed: ClassVar = {"softmax_lse": "lse"}
    no_window = None
