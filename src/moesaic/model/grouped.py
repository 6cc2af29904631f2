"""Products of rows, sorted by expert, with the matrices of their experts, a group of experts at a time.

Where every expert of a group has as many rows, the group is one batched product, whose threads take whole
experts each; where each has few, as in decoding or with thousands of experts, it is one call of our kernels
(native/rows.cpp); else there is one product per expert. On CUDA the group is everything and the products are
``grouped_mm``, which reads the counts on the device.

Shape legend: R rows of all experts, r rows of a group, E experts, I and O what goes into and comes out of a
product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.machine import prefers_onednn
from moesaic.model.dispatch import Layer, rows_of
from moesaic.native import rows as few_rows

# What one group's rows may take between its products: enough experts to keep operators few, few enough for
# what one product writes to be in the cache when the next reads it.
_GROUP_BYTES = 2**23
_FEW_SHAPES = 2**19  # elements of a matrix below which compiling a product costs more than filling rows up
_LARGE = 2**19  # elements of a matrix from which oneDNN's float32 products pay, on the machines where they do


def fill(counts_E: list[int], matrix: int, dtype: torch.dtype) -> list[int]:
    """How many rows to lay out for each expert on CPU, ``counts_E`` of them real; a matrix has ``matrix``
    elements.

    Equal counts make a batched product: there is one call where there were E. oneDNN compiles a bf16 product
    anew for every new shape, 3.5 ms against 0.4 ms to run it (500–1,500 rows, 192 × 384): multiples of 64
    leave it few shapes. With OLMoE's matrices (2048 × 1024) neither pays: a product of 64 rows reaches 0.9 of
    what a large one does, and filling up would cost up to a half.
    """
    rows, most, experts = sum(counts_E), max(counts_E), len(counts_E)
    if not rows or matrix >= _FEW_SHAPES:
        return counts_E
    bf16 = dtype == torch.bfloat16
    if experts * most <= 1.3 * rows and rows >= 32 * experts:
        unit = 64 if bf16 and most > 64 else 4
        return [-(-most // unit) * unit] * experts
    if bf16 and rows >= 64 * experts:
        return [-(-count // 64) * 64 for count in counts_E]
    return counts_E


def groups(counts_E: list[int], layer: Layer, columns: int, like: Tensor) -> Iterator["Group"]:
    """Neighbouring experts whose rows, ``columns`` numbers each of the dtype of ``like``, fit the cache
    together; each expert belongs to one group, one without rows too."""
    limit = _GROUP_BYTES // (columns * like.element_size())
    total = sum(counts_E)
    if like.device.type == "cuda" or total <= limit:
        yield Group(slice(0, len(counts_E)), slice(0, total), counts_E, like.device, layer)
        return
    start = row = 0
    while start < len(counts_E):
        end, rows = start + 1, counts_E[start]
        while end < len(counts_E) and rows + counts_E[end] <= limit:
            rows += counts_E[end]
            end += 1
        yield Group(slice(start, end), slice(row, row + rows), counts_E[start:end], like.device, layer)
        start, row = end, row + rows


@dataclass(frozen=True)
class Group:
    """Experts ``experts`` of a bank, which work on the rows ``rows``, ``counts`` of each, out of all rows of
    ``layer``: by these it is decided how float32 products are made, so that the same bits come out however
    experts are grouped."""

    experts: slice
    rows: slice
    counts: list[int]
    device: torch.device
    layer: Layer

    def products(
        self, x_rI: Tensor, stack_EIO: Tensor, bias_EO: Tensor | None = None, out_rO: Tensor | None = None
    ) -> Tensor:
        """Each row times the matrix of its expert, plus that expert's bias; [r, O]."""
        if out_rO is None:
            out_rO = x_rI.new_empty(len(x_rI), stack_EIO.shape[2])
        stack = stack_EIO[self.experts]
        bias = None if bias_EO is None else bias_EO[self.experts]
        if self._grouped(x_rI, stack):
            out_rO.copy_(F.grouped_mm(x_rI, stack, offs=self._offsets()))
            return out_rO if bias_EO is None else out_rO.add_(self.spread(bias_EO))
        few, equal = self.layer.rows.few, self._equal(x_rI.dtype)
        if few(stack.mT):
            out_rO.copy_(few_rows.products(x_rI, few_rows.Stack(stack.mT, bias), self._rows))
        elif bias is None and few(stack):
            out_rO.copy_(few_rows.transposed_products(x_rI, stack, self._rows))
        elif equal and bias is None:
            torch.bmm(self._slab(x_rI), stack, out=self._slab(out_rO))
        elif equal and bias is not None:
            torch.baddbmm(bias[:, None], self._slab(x_rI), stack, out=self._slab(out_rO))
        elif bias is None:
            onednn = x_rI.dtype == torch.float32 and stack[0].numel() >= _LARGE and prefers_onednn()
            for out, x, matrix in zip(self._parts(out_rO), self._parts(x_rI), self._used(stack), strict=True):
                if onednn:
                    out.copy_(torch.ops.mkldnn._linear_pointwise(x, matrix.t(), None, "none", [], ""))
                else:
                    torch.mm(x, matrix, out=out)
        else:
            parts = (self._parts(out_rO), self._parts(x_rI), self._used(stack), self._used(bias))
            for out, x, matrix, row in zip(*parts, strict=True):
                torch.addmm(row, x, matrix, out=out)
        return out_rO

    def outer_products(self, dy_rO: Tensor, x_rI: Tensor, grad_EOI: Tensor) -> None:
        """Write each expert's sum over its rows of dy ⊗ x into its slice of ``grad_EOI``; zero where it has
        none."""
        grad = grad_EOI[self.experts]
        if self._grouped(dy_rO, grad):
            grad.copy_(F.grouped_mm(dy_rO.t(), x_rI, offs=self._offsets()))
            for expert, count in enumerate(self.counts):
                if not count:  # what is written for an empty group differs between versions and devices
                    grad[expert].zero_()
            return
        if self.layer.rows.few(grad):
            few_rows.outer_products(dy_rO, x_rI, grad, list(accumulate(self.counts)))
            return
        if self._equal(dy_rO.dtype):
            torch.bmm(self._slab(dy_rO).mT, self._slab(x_rI), out=grad)
            return
        for expert, count in enumerate(self.counts):
            if not count:
                grad[expert].zero_()
        for part, dy, x in zip(self._used(grad), self._parts(dy_rO), self._parts(x_rI), strict=True):
            torch.mm(dy.t(), x, out=part)

    def sums(self, dy_rO: Tensor, grad_EO: Tensor) -> None:
        """Write each expert's sum of rows into its slice of ``grad_EO``, which is zero before."""
        grad = grad_EO[self.experts]
        if self._equal(dy_rO.dtype):
            torch.sum(self._slab(dy_rO), dim=1, out=grad)
            return
        for total, part in zip(self._used(grad), self._parts(dy_rO), strict=True):
            torch.sum(part, dim=0, out=total)

    def spread(self, bias_EO: Tensor) -> Tensor:
        """The slice of its expert for each row, [r, O]."""
        counts = torch.tensor(self.counts, device=self.device)
        return bias_EO[self.experts].repeat_interleave(counts, dim=0, output_size=sum(self.counts))

    @cached_property
    def _rows(self) -> few_rows.Rows:
        return rows_of(self.counts)

    @cached_property
    def _sizes(self) -> list[int]:
        return [self.counts[e] for e in self._rows.hit]

    def _equal(self, dtype: torch.dtype) -> bool:
        alike = len(self.counts) > 1 and min(self.counts) == max(self.counts) > 0
        return alike and (self.layer.equal or dtype != torch.float32)

    def _slab(self, x_rI: Tensor) -> Tensor:
        return x_rI.view(len(self.counts), -1, x_rI.shape[1])

    # Views are made by split and unbind, all in one call: an index costs 2 µs, and a step of makeMoE's model
    # had 1,600 of them.

    def _parts(self, x_rI: Tensor) -> Sequence[Tensor]:
        """The rows of each expert that has any."""
        return x_rI.split(self._sizes) if self._sizes else ()

    def _used(self, stack: Tensor) -> Sequence[Tensor]:
        """The slice of each expert that has any rows; the others are not touched."""
        hit = self._rows.hit
        return stack.unbind() if len(hit) == len(self.counts) else [stack[e] for e in hit]

    def _grouped(self, rows: Tensor, stack: Tensor) -> bool:
        """Whether ``grouped_mm`` has a kernel for this: bf16 on compute capability 9 or above, every stride a
        multiple of 16 bytes. Elsewhere it is a loop that waits for the device."""
        if self.device.type != "cuda" or rows.dtype != torch.bfloat16 or not len(rows):
            return False
        aligned = all(size % 8 == 0 for size in (*stack.shape[1:], rows.shape[1]))
        return aligned and torch.cuda.get_device_capability(self.device)[0] >= 9

    def _offsets(self) -> Tensor:
        return torch.tensor(self.counts, device=self.device).cumsum(0).to(torch.int32)
