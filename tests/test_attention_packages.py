"""flash-attn 2, 3 and 4 and PyTorch's CUDA kernels without a GPU: stand-ins with the true arguments
and the kernels' demands compute with `Tiles`, so that merge, leaves and gradients run through
them."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo_fast.attention import MergedAttention
from grpo_fast.attention_backends import CUDAFlash, Efficient, Scoring, Tiles
from grpo_fast.attention_packages import FlashAttn2, FlashAttn3, FlashAttn4
from grpo_fast.layout import Leaf, PromptLeaves, Spans, chunk_layout, row_layout
from grpo_fast.reference_attention import dense_attention, visible

CPU = torch.device("cpu")
HQ, HK, D = 4, 2, 8
# Lone sequences, prompts, completions of each. The second row has completions of one token at most,
# where flash-attn 2 would decode, and a prompt whose completions are all empty.
ROWS = {
    "row": ((3, 5), (4, 2, 3), ((2, 6, 1), (0, 0), (5, 0, 3))),
    "short": ((1,), (1, 2), ((0, 0), (1, 0))),
}
# Of flash-attn 2.8.4, of version 3 beside it, and of flash-attn-4 4.0.0b36: each argument, and
# whether it must be given.
SIGNATURES = {
    FlashAttn2: (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal "
        "window_size_left= window_size_right= softcap= alibi_slopes= return_softmax= block_table= "
        "leftpad_k= seqused_k= zero_tensors= num_splits=",
        "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
        "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
        "deterministic rng_state= zero_tensors=",
    ),
    FlashAttn3: (
        "q k v k_new= v_new= qv= out_= cu_seqlens_q= cu_seqlens_k= cu_seqlens_k_new= seqused_q= "
        "seqused_k= max_seqlen_q= max_seqlen_k= page_table= kv_batch_idx= leftpad_k= rotary_cos= "
        "rotary_sin= seqlens_rotary= q_descale= k_descale= v_descale= softmax_scale= causal= "
        "window_size_left= window_size_right= attention_chunk= softcap= rotary_interleaved= "
        "scheduler_metadata= num_splits= pack_gqa= sm_margin=",
        "dout q k v out softmax_lse cu_seqlens_q= cu_seqlens_k= sequed_q= sequed_k= max_seqlen_q= "
        "max_seqlen_k= dq= dk= dv= softmax_scale= is_causal= window_size_left= window_size_right= "
        "softcap= deterministic= sm_margin=",
    ),
    FlashAttn4: (
        "q k v qv= cu_seqlens_q= cu_seqlens_k= seqused_q= seqused_k= max_seqlen_q= max_seqlen_k= "
        "min_seqlen_k= page_table= softmax_scale= causal= softcap= window_size_left= "
        "window_size_right= learnable_sink= tile_mn= mma_pv_is_rs= intra_wg_overlap= num_threads= "
        "num_splits= pack_gqa= _arch= score_mod= mask_mod= block_sparse_tensors= return_lse= out= "
        "lse= aux_tensors= aux_scalars= q_descale= k_descale= v_descale= gather_kv_indices= "
        "scheduler_metadata= seqlen_k_per_split= disable_scheduler_metadata= "
        "gather_bwd_recompute_p=",
        "q k v out dout lse softmax_scale= causal= softcap= window_size_left= window_size_right= "
        "m_block_size= n_block_size= num_threads= pack_gqa= num_stages_Q= num_stages_dO= "
        "SdP_swapAB= dKV_swapAB= dQ_swapAB= AtomLayoutMSdP= AtomLayoutNdKV= AtomLayoutMdQ= "
        "V_in_regs= cu_seqlens_q= cu_seqlens_k= seqused_q= seqused_k= max_seqlen_q= max_seqlen_k= "
        "deterministic= dq= dk= dv= score_mod= score_mod_bwd= mask_mod= aux_tensors= aux_scalars= "
        "block_sparse_tensors= dlse= learnable_sink=",
    ),
}
PACKAGES = list(SIGNATURES)


def qkv(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(heads, tokens, D, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (HQ, HK, HK)
    ]


def close(found, expected):
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    # At least 1: with a window of one token the gradient of the queries is exactly 0.
    assert (found - expected).norm() <= 1e-12 * max(expected.norm(), 1.0)


def check(backend, row, scoring):
    """Value and gradients of a row by `backend`, against one softmax over a dense mask."""
    seen = visible(*row, window=scoring.window)
    inputs = qkv(len(seen))
    out = MergedAttention.apply(*inputs, row_layout(*row, CPU), None, backend, scoring)
    expected = dense_attention(*inputs, seen, scale=scoring.scale, softcap=scoring.softcap)
    close(out, expected)
    generator = torch.Generator().manual_seed(1)
    above = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    truth = torch.autograd.grad(expected, inputs, above)
    for mine, theirs in zip(torch.autograd.grad(out, inputs, above), truth, strict=True):
        close(mine, theirs)


def check_chunks(backend):
    """What completions leave in the leaves of their prompt, against the gradient of one row."""
    scoring, prompt, lengths = Scoring(0.4, True), 5, (4, 3, 6)
    inputs = qkv(prompt + sum(lengths))
    seen = visible((), (prompt,), (lengths,))
    expected = dense_attention(*inputs, seen, scale=scoring.scale)
    above = torch.ones_like(expected)
    above[:, :prompt] = 0
    truth = torch.autograd.grad(expected, inputs, above)
    q, k, v = (x.detach() for x in inputs)
    leaf, at = Leaf(k[:, :prompt], v[:, :prompt]), prompt
    for chunk in (lengths[:2], lengths[2:]):
        rows = slice(at, at + sum(chunk))
        at = rows.stop
        part = [x[:, rows].clone().requires_grad_() for x in (q, k, v)]
        layout = chunk_layout(chunk, PromptLeaves(trained=True), prompt, CPU)
        out = MergedAttention.apply(*part, layout, leaf, backend, scoring)
        close(out, expected[:, rows])
        # A sum gives one gradient for all, of strides 0.
        for mine, theirs in zip(torch.autograd.grad(out.sum(), part), truth, strict=True):
            close(mine, theirs[:, rows])
    close(leaf.key_grad, truth[1][:, :prompt])
    close(leaf.value_grad, truth[2][:, :prompt])


def spans_of(cu_queries, cu_keys, longest_query, longest_key) -> Spans:
    """As a kernel reads them, after its checks."""
    assert cu_queries.dtype == cu_keys.dtype == torch.int32
    queries, keys = (x.diff().tolist() for x in (cu_queries, cu_keys))
    assert longest_query >= max(queries)
    assert longest_key >= max(keys)
    # Decoding: a query a range, and no more room than that.
    assert longest_query > 1 or queries == [1] * len(queries)
    return Spans.of(queries, keys, CPU)


def heads_first(*tokens):
    for x in tokens:
        assert x.stride(-1) == 1
    return [x.transpose(0, 1) for x in tokens]


def scoring_of(given, package, causal="causal") -> Scoring:
    left, right = given["window_size_left"], given["window_size_right"]
    nothing = None if package is FlashAttn4 else -1
    window = None if left == nothing else left + 1
    assert right == (nothing if window is None else 0)
    return Scoring(given["softmax_scale"], given[causal], given["softcap"] or None, window)


def given_spans(given) -> Spans:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return spans_of(*(given[name] for name in names))


def signature(text: str) -> inspect.Signature:
    return inspect.Signature(
        [
            inspect.Parameter(
                name.rstrip("="),
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=None if name.endswith("=") else inspect.Parameter.empty,
            )
            for name in text.split()
        ]
    )


def taking(arguments: inspect.Signature, function):
    def called(**given):
        arguments.bind(**given)
        return function(**given)

    called.__signature__ = arguments
    return called


def installed(package, monkeypatch, change=lambda text: text) -> SimpleNamespace:
    """A stand-in for `package` among the modules; how often its functions ran."""
    calls = SimpleNamespace(forward=0, backward=0)

    def forward(**given):
        calls.forward += 1
        q, k, v = heads_first(given["q"], given["k"], given["v"])
        assert given.get("dropout_p", 0.0) == 0.0
        if package is FlashAttn4:
            assert given["return_lse"] is True
        out, lse = Tiles().forward(q, k, v, given_spans(given), scoring_of(given, package))
        rest = (None, None) if package is not FlashAttn2 else (torch.empty(0), torch.empty(2))
        return out.transpose(0, 1).contiguous(), lse, *rest

    def backward(**given):
        calls.backward += 1
        assert 0 not in given["dout"].stride()
        tensors = heads_first(*(given[name] for name in ("dout", "q", "k", "v", "out")))
        lse = given["lse" if package is FlashAttn4 else "softmax_lse"]
        assert lse.is_contiguous()
        causal = "is_causal" if package is FlashAttn3 else "causal"
        spans, scoring = given_spans(given), scoring_of(given, package, causal)
        found = Tiles().backward(*tensors, lse, spans, scoring)
        for name, x in zip(("dq", "dk", "dv"), found, strict=True):
            for rows, keys in spans.ranges():
                # A kernel may pass over keys that no query looks at.
                at = rows if name == "dq" else keys if rows.stop > rows.start else slice(0)
                given[name][at] = x.transpose(0, 1)[at]

    module = ModuleType(package.module)
    texts = map(change, SIGNATURES[package])
    for name, function, text in zip(package.names, (forward, backward), texts, strict=True):
        setattr(module, name, taking(signature(text), function))
    monkeypatch.setitem(sys.modules, package.module, module)
    return calls


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_shared_row_through_a_package_is_one_softmax(package, softcap, row, monkeypatch):
    calls = installed(package, monkeypatch)
    assert package.problem() is None
    check(package(), row, Scoring(1.3, True, softcap))
    assert (calls.forward, calls.backward) == (2, 2)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_window_through_a_package(package, window, monkeypatch):
    installed(package, monkeypatch)
    check(package(), ((9, 1, 13), (), ()), Scoring(1.3, True, None, window))


@pytest.mark.parametrize("package", PACKAGES)
def test_chunks_through_a_package_leave_the_gradient_of_their_prompt(package, monkeypatch):
    installed(package, monkeypatch)
    check_chunks(package())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_version_with_other_arguments_is_named_and_not_used(package, monkeypatch):
    installed(package, monkeypatch, lambda text: text.replace("softcap", "soft_cap"))
    assert "takes other arguments than" in package.problem()
    assert "softcap" in package.problem()
    installed(package, monkeypatch, lambda text: f"seed {text}")
    assert "missing a required argument: 'seed'" in package.problem()


def test_the_arguments_behind_a_custom_op_are_read():
    @torch.library.custom_op("grpo_fast_test::attend", mutates_args=())
    def attend(q: torch.Tensor) -> torch.Tensor:
        return q.clone()

    class Odd(FlashAttn2):
        @classmethod
        def functions(cls):
            return attend, attend

    assert "unexpected keyword argument" in Odd.problem()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_not_there_says_so(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package.module, None)
    assert package.problem().startswith(f"it needs the package {package.package} (")
    monkeypatch.setitem(sys.modules, package.module, ModuleType(package.module))
    assert package.names[0] in package.problem()


class FakeAten:
    """PyTorch's CUDA operators by `Tiles`, with their order of arguments and their demands."""

    def _flash_attention_forward(
        self, q, k, v, cu_q, cu_k, longest_q, longest_k, dropout, causal, debug, *, scale, **window
    ):
        assert (dropout, debug) == (0.0, False)
        spans = spans_of(cu_q, cu_k, longest_q, longest_k)
        scoring = self.scoring(scale, causal, **window)
        out, lse = Tiles().forward(*heads_first(q, k, v), spans, scoring)
        return out.transpose(0, 1).contiguous(), lse, None, None, None

    def _flash_attention_backward(
        self,
        *tensors,
        scale,
        **window,
    ):
        grad, q, k, v, out, lse, cu_q, cu_k, longest_q, longest_k, dropout, causal = tensors[:12]
        assert dropout == 0.0
        assert [x.dtype for x in tensors[12:]] == [torch.uint64] * 2
        assert lse.is_contiguous()
        # The operator makes these two contiguous itself.
        grad, out = grad.contiguous(), out.contiguous()
        spans = spans_of(cu_q, cu_k, longest_q, longest_k)
        scoring = self.scoring(scale, causal, **window)
        found = Tiles().backward(*heads_first(grad, q, k, v, out), lse, spans, scoring)
        return tuple(x.transpose(0, 1) for x in found)

    @staticmethod
    def scoring(scale, causal, window_size_left=None, window_size_right=None):
        assert (window_size_left is None) == (window_size_right is None)
        window = None if window_size_left is None else window_size_left + 1
        assert window is None or (causal and window_size_right == 0)
        return Scoring(scale, causal, None, window)

    def _efficient_attention_forward(
        self, q, k, v, bias, cu_q, cu_k, longest_q, longest_k, dropout, mask, with_lse, *, scale
    ):
        assert (bias, dropout, with_lse) == (None, 0.0, True)
        assert q.shape[2] == k.shape[2] == v.shape[2]
        spans = self.batch_spans(q, k, cu_q, cu_k, longest_q, longest_k)
        scoring = Scoring(scale, {0: False, 1: True}[mask])
        out, lse = Tiles().forward(*heads_first(q[0], k[0], v[0]), spans, scoring)
        blocks = -(-longest_q // 32) * 32
        padded = lse.new_full((len(spans.queries), len(lse), blocks), torch.nan)
        for rows, (at, _) in zip(padded, spans.ranges(), strict=True):
            rows[:, : at.stop - at.start] = lse[:, at]
        return out.transpose(0, 1).contiguous()[None], padded, None, None, longest_q, longest_k

    def _efficient_attention_backward(self, *given, scale):
        grad, q, k, v, bias, out, cu_q, cu_k, longest_q, longest_k, padded = given[:11]
        dropout, seed, offset, mask, bias_grad = given[11:]
        assert (bias, dropout, bias_grad) == (None, 0.0, False)
        assert seed.dtype == offset.dtype == torch.int64
        # Its rows are found by the number of heads, not by strides.
        assert out.is_contiguous()
        spans = self.batch_spans(q, k, cu_q, cu_k, longest_q, longest_k)
        assert padded.shape == (len(spans.queries), q.shape[2], -(-longest_q // 32) * 32)
        lse = torch.empty(q.shape[2], q.shape[1], dtype=padded.dtype)
        for rows, (at, _) in zip(padded, spans.ranges(), strict=True):
            lse[:, at] = rows[:, : at.stop - at.start]
            assert (rows[:, at.stop - at.start :] == torch.inf).all()
        tensors = heads_first(grad.contiguous()[0], q[0], k[0], v[0], out[0])
        scoring = Scoring(scale, {0: False, 1: True}[mask])
        found = Tiles().backward(*tensors, lse, spans, scoring)
        return *(x.transpose(0, 1)[None] for x in found), None

    @staticmethod
    def batch_spans(q, k, cu_q, cu_k, longest_q, longest_k):
        assert q.shape[0] == k.shape[0] == 1
        assert longest_q <= q.shape[1]
        assert longest_k <= k.shape[1]
        assert cu_q.dtype == cu_k.dtype == torch.int32
        return Spans.of(cu_q.diff().tolist(), cu_k.diff().tolist(), CPU)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("backend", [CUDAFlash(), Efficient()], ids=lambda x: type(x).__name__)
def test_the_operators_of_pytorch_on_cuda(backend, row, monkeypatch):
    monkeypatch.setattr("grpo_fast.attention_backends.aten", FakeAten())
    check(backend, row, Scoring(1.3, True))
    check_chunks(backend)


def test_values_of_another_width_than_keys_through_efficient_kernels(monkeypatch):
    monkeypatch.setattr("grpo_fast.attention_backends.aten", FakeAten())
    spans, scoring = Spans.of([2, 0, 3], [4, 1, 2], CPU), Scoring(1.3, False)
    q, k, v = (x.detach() for x in qkv(7))
    q, v = q[:, :5], torch.cat([v, v.flip(-1)], -1)
    found, expected = (x.forward(q, k, v, spans, scoring) for x in (Efficient(), Tiles()))
    grad = expected[0].cos()
    downs, truth = (
        x.backward(grad, q, k, v, *expected, spans, scoring) for x in (Efficient(), Tiles())
    )
    for mine, theirs in zip((*found, *downs), (*expected, *truth), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("window", [1, 3])
def test_a_window_of_pytorch_s_flash(window, monkeypatch):
    monkeypatch.setattr("grpo_fast.attention_backends.aten", FakeAten())
    check(CUDAFlash(), ((9, 1, 13), (), ()), Scoring(1.3, True, None, window))


class Recorder:
    """PyTorch's operators by their schemas alone: what each is given, by name."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            arguments = getattr(torch.ops.aten, name).default._schema.arguments
            positional = [x.name for x in arguments if not x.kwarg_only]
            assert len(args) <= len(positional)
            given = dict(zip(positional, args, strict=False)) | kwargs
            assert given.keys() <= {x.name for x in arguments}
            assert not [
                x.name for x in arguments if x.name not in given and not x.has_default_value()
            ]
            self.calls.append(given)
            raise NotImplementedError(name)

        return call


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize("kind", [CUDAFlash, Efficient])
def test_the_operators_of_this_pytorch_take_what_we_give_them(kind, call, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("grpo_fast.attention_backends.aten", recorder)
    q, k, v = (x.detach() for x in qkv(5))
    spans, lse = Spans.of([5], [5], CPU), torch.zeros(HQ, 5)
    tensors = (q, k, v) if call == "forward" else (q, q, k, v, q, lse)
    with pytest.raises(NotImplementedError):
        getattr(kind(), call)(*tensors, spans, Scoring(0.3, True))
    (given,) = recorder.calls
    flash = kind is CUDAFlash
    assert given["cum_seq_q" if flash else "cu_seqlens_q"] is spans.cu_queries
    assert given["cum_seq_k" if flash else "cu_seqlens_k"] is spans.cu_keys
    assert given["max_q" if flash else "max_seqlen_q"] == 5
    assert given["max_k" if flash else "max_seqlen_k"] == 5
    assert given["is_causal" if flash else "custom_mask_type"] == 1
    assert (given["dropout_p"], given["scale"]) == (0.0, 0.3)
    if call == "backward":
        assert given["out"].shape == given["grad_out" if flash else "grad_out_"].shape
        assert given["logsumexp"].dtype == torch.float32
