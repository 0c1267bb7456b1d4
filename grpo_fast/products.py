"""The products of a language-model head with hidden states, on any device: logits, d(hidden),
d(weight), d(bias).

Shapes: `N` rows of a call, `n` of a chunk of them, `D` hidden, `V` vocabulary. Sums are float32
(float64 for float64 hidden states), whatever the inputs.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# A slab of the head, widened for one product: it stays in the last-level cache until that is done.
SLAB_BYTES = 8 * 2**20
# d(weight) is summed in pieces of this size where it is rounded at the end: each one goes back to
# the system as soon as it is rounded (the C library keeps what is smaller than 32 MiB).
SUM_BYTES = 64 * 2**20


class Gradients(NamedTuple):
    """In the dtypes of the inputs; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else: the dtype of log-probs, losses and
    accumulators."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def gradient_dtype(given: Tensor, hidden: Tensor) -> torch.dtype:
    """Of the gradient in `given` until a backward scales it: float16 lacks the range for that."""
    return torch.bfloat16 if given.dtype == torch.bfloat16 else exact_dtype(hidden)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Float32 products of a CPU multiply in bfloat16 and accumulate in float32, where it has units
    for that: operands that are bfloat16 numbers lose nothing and take half the time."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class HeadProducts:
    """`hidden @ weight.T + bias` and its gradients, a chunk of rows at a time.

    hidden [N, D], weight [V, D], bias [V]. `row_major=False` keeps the entries of one vocabulary
    item side by side, the layout in which a CPU multiplies fastest; results are [n, V] either way.
    `every_row=False`: some rows get no gradient, and so zeros. `summed`: d(hidden) is one of
    several terms and stays exact.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needed: tuple[bool, bool, bool],
        *,
        row_major: bool,
        every_row: bool = True,
        summed: bool = False,
    ):
        self.exact = exact_dtype(hidden)
        self.row_major = row_major
        self.half = hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)
        self.bfloat16 = not hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16
        given = (hidden, weight, bias)
        self.dtypes = [None if x is None else gradient_dtype(x, hidden) for x in given]
        self.weight, self.slab = weight, weight.shape[0]
        if self.half:
            self.weight = weight.to(hidden.dtype)  # as autocast would
        elif weight.dtype != self.exact:
            self.slab = max(SLAB_BYTES // (self.exact.itemsize * weight.shape[1]), 1)
            if self.slab >= weight.shape[0]:
                self.weight = weight.to(self.exact)
        self.bias = None if bias is None else bias.to(self.exact)
        self.tile: Tensor | None = None
        self.empty = True
        self.dhidden = None
        if needed[0]:
            # A row is written once, so it need not be exact before the end.
            make = torch.empty_like if every_row else torch.zeros_like
            self.dhidden = make(hidden, dtype=self.exact if summed else self.dtypes[0])
        self.dweight = self._pieces() if needed[1] else None
        self.dbias = torch.zeros_like(self.bias) if needed[2] else None

    def _pieces(self) -> list[Tensor]:
        rows, width = self.weight.shape
        size = rows
        if self.dtypes[1] == torch.bfloat16 and not self.weight.is_cuda:
            size = max(SUM_BYTES // (self.exact.itemsize * width), 1)
        return [
            self.weight.new_empty((min(size, rows - start), width), dtype=self.exact)
            for start in range(0, rows, size)
        ]

    def _precision(self) -> AbstractContextManager:
        return _bfloat16_products() if self.bfloat16 else nullcontext()

    def _slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """The head in the exact dtype, (rows of it, weight) at a time."""
        rows = self.weight.shape[0]
        if self.weight.dtype == self.exact:
            yield slice(0, rows), self.weight
            return
        wide = self.weight.new_empty((self.slab, self.weight.shape[1]), dtype=self.exact)
        for start in range(0, rows, self.slab):
            part = slice(start, min(start + self.slab, rows))
            yield part, wide[: part.stop - start].copy_(self.weight[part])

    def _workspace(self, n: int) -> Tensor:
        """One [n, V] tile for all chunks: new memory costs a CPU more than writing to it."""
        v = self.weight.shape[0]
        if self.tile is None or len(self.tile) < n:
            if self.row_major:
                self.tile = self.weight.new_empty((n, v), dtype=self.exact)
            else:
                self.tile = self.weight.new_empty((v, n), dtype=self.exact).t()
        return self.tile[:n]

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden @ weight.T + bias` of a chunk [n, D] in the exact dtype; holds until the next
        call."""
        tile = self._workspace(len(hidden))
        if self.half:
            torch.mm(hidden, self.weight.t(), out_dtype=torch.float32, out=tile)
        else:
            hidden = hidden.to(self.exact)
            with self._precision():
                for part, weight in self._slabs():
                    torch.mm(hidden, weight.t(), out=tile[:, part])
        return tile if self.bias is None else tile.add_(self.bias)

    def add(self, rows: slice | Tensor, hidden: Tensor, dlogits: Tensor) -> None:
        """dlogits [n, V] in the exact dtype, of rows `rows` whose hidden states are `hidden` [n,
        D]."""
        if self.dbias is not None:
            self.dbias += dlogits.sum(0)
        if self.half:
            self._add_half(rows, hidden, dlogits)
        else:
            with self._precision():
                self._add_exact(rows, hidden.to(self.exact), dlogits)
        self.empty = False

    def _add_exact(self, rows: slice | Tensor, hidden: Tensor, dlogits: Tensor) -> None:
        if self.dhidden is not None:
            total = torch.empty_like(hidden)
            for part, weight in self._slabs():
                total.addmm_(dlogits[:, part], weight, beta=float(part.start > 0))
            self.dhidden[rows] = total.to(self.dhidden.dtype)
        if self.dweight is not None:
            parts = dlogits.split([len(piece) for piece in self.dweight], dim=1)
            for piece, part in zip(self.dweight, parts, strict=True):
                piece.addmm_(part.t(), hidden, beta=float(not self.empty))

    def _add_half(self, rows: slice | Tensor, hidden: Tensor, dlogits: Tensor) -> None:
        # Gradients span decades: a power of two keeps them in float16's range and costs no digit.
        scale = None
        if hidden.dtype == torch.float16:
            peak = dlogits.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            scale = torch.exp2(torch.floor(torch.log2(peak)))
            dlogits = dlogits / scale
        low = dlogits.to(hidden.dtype)
        if self.dhidden is not None:
            product = torch.mm(low, self.weight, out_dtype=torch.float32)
            product = product if scale is None else product.mul_(scale)
            self.dhidden[rows] = product.to(self.dhidden.dtype)
        if self.dweight is not None:
            (total,) = self.dweight
            if scale is not None:
                if self.empty:
                    total.zero_()
                total.addcmul_(torch.mm(low.t(), hidden, out_dtype=torch.float32), scale)
            else:
                beta = float(not self.empty)
                torch.addmm(total, low.t(), hidden, beta=beta, out_dtype=torch.float32, out=total)

    def scale_hidden(self, rows: slice | Tensor, factor: Tensor) -> None:
        """`d(hidden)[rows] *= factor[:, None]`."""
        self.dhidden[rows] = (self.dhidden[rows] * factor[:, None]).to(self.dhidden.dtype)

    def gradients(self) -> Gradients:
        """The sums over all chunks, which are used up. Bfloat16 is rounded to here, once; float16
        only when the loss scale has been applied."""
        self.tile = None
        pieces = self.dweight
        for piece in pieces or () if self.empty else ():
            piece.zero_()
        return Gradients(
            _rounded(self.dhidden, self.dtypes[0]),
            None if pieces is None else self._joined(pieces),
            _rounded(self.dbias, self.dtypes[2]),
        )

    def _joined(self, pieces: list[Tensor]) -> Tensor:
        if len(pieces) == 1:
            return _rounded(pieces.pop(), self.dtypes[1])
        whole = self.weight.new_empty(self.weight.shape, dtype=self.dtypes[1])
        start = 0
        while pieces:
            piece = pieces.pop(0)
            whole[start : start + len(piece)] = piece
            start += len(piece)
        return whole


def _rounded(total: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if total is None else total.to(dtype)
