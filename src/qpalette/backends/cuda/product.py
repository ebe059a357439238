"""Products with packed matrices on a CUDA device, prepared: what does not change from call to call is made once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import accumulate

import torch

from qpalette.backends.cuda.layout import check_layout
from qpalette.backends.cuda.multiply import MOST_BATCH, ProductLaunch, batch_columns
from qpalette.backends.cuda.rotate import ALIGNMENT, TYPES, RotationLaunch, aligned, padded_columns, type_of_values
from qpalette.backends.cuda.segments import MOST_SEGMENTS
from qpalette.backends.cuda.unpack import SLAB_BYTES, RescaleLaunch, UnpackLaunch, cut_into_slabs
from qpalette.core.records import TILE
from qpalette.runtime import PackedLinear

# Above so many tokens matrices are decoded and multiplied by cuBLAS; below, MOST_BATCH tokens a launch. On an H100, a
# matrix of 4096 x 4096 at 3.25 bits: 9.8 us a launch of 16 tokens; decoded 30.4 us for 32 tokens, 31.0 for 64, 43.5 for
# 256 (benchmarks/results/gemv.json).
MOST_FUSED_TOKENS = 48
MANY = 1 << 16  # tokens: a rotation is cut alike for any number above MOST_BATCH


LEAST_SCRATCH_BYTES = 1 << 20
# A launch's arguments are one block of memory, and so is x' between a rotation and its products.
_ONE_AT_A_TIME = threading.Lock()
_scratches: dict[tuple[torch.device, int], torch.Tensor] = {}


class CudaProduct:
    """x [..., K] -> W x of each of `members`, which share diagonal and rotation and are in the chunk layout.

    What is changed in place, or put in the place of a tensor's data, is seen by the next call. Without `overlap` no
    kernel reads ahead of the one before it: where that made the codes or the diagonal.
    Raises UnsupportedError for another layout.
    """

    def __init__(self, members: Sequence[PackedLinear], overlap: bool = True) -> None:
        check_layout(members)
        first = members[0]
        self.members, self.overlap = list(members), overlap
        self.index, self.inputs = first.codes.device.index, first.in_features
        self.rows = [member.out_features for member in members]
        self.width = sum(self.rows)
        self._tensors = [first.diagonal, *(tensor for member in members for tensor in (member.codes, member.scales))]
        self._addresses = self._present_addresses()
        self._fused: dict[tuple[int, torch.dtype], _FusedProduct] = {}
        self._by_library: dict[torch.dtype, _LibraryProduct] = {}

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One tensor [..., M] for each member, of x's dtype; contiguous where there are more than MOST_FUSED_TOKENS:
        torch's element-wise kernels for others took 2.8 of 45 ms of a prompt of 1024 tokens (Llama-3.1-8B, H100)."""
        if x.numel() > MOST_FUSED_TOKENS * self.inputs:
            outputs = [x.new_empty((*x.shape[:-1], rows)) for rows in self.rows]
            self._run(x, outputs)
            return outputs
        result = self.joined(x)
        return [result] if len(self.rows) == 1 else list(result.split(self.rows, -1))

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """[..., sum of M], side by side."""
        result = x.new_empty((*x.shape[:-1], self.width))
        self._run(x, [result])
        return result

    def _run(self, x: torch.Tensor, outputs: list[torch.Tensor]) -> None:
        """`outputs` is one tensor, with all results side by side, or one for each member."""
        if x.dtype not in TYPES:
            for y, wider in zip(
                outputs, [self.joined(x.float())] if len(outputs) == 1 else self(x.float()), strict=True
            ):
                y.copy_(wider)
            return
        if not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
            x = aligned(x.contiguous())
        if torch.cuda.current_device() == self.index:
            self._start(x, outputs)
        else:  # launches go to the current device
            with torch.cuda.device(self.index):
                self._start(x, outputs)

    def _start(self, x: torch.Tensor, outputs: list[torch.Tensor]) -> None:
        tokens, size = x.numel() // self.inputs, x.itemsize
        stream = torch._C._cuda_getCurrentRawStream(self.index)  # as torch.compile's code: 0.1 us, not 3
        if self._present_addresses() != self._addresses:
            self._fused, self._by_library, self._addresses = {}, {}, self._present_addresses()
        if tokens > MOST_FUSED_TOKENS:
            library_product = self._library_product(x.dtype)
            with _ONE_AT_A_TIME:
                library_product(x, tokens, self._apart(outputs, tokens), stream)
            return
        y = outputs[0]
        for start in range(0, tokens, MOST_BATCH):
            product = self._fused_product(min(MOST_BATCH, tokens - start), x.dtype)
            address = x.data_ptr() + start * self.inputs * size
            with _ONE_AT_A_TIME:
                product(address, y.data_ptr() + start * self.width * size, stream)

    def _apart(self, outputs: list[torch.Tensor], tokens: int) -> list[torch.Tensor]:
        """[tokens, M] of each member."""
        if len(outputs) == 1:
            return list(outputs[0].view(tokens, self.width).split(self.rows, dim=1))
        return [y.view(tokens, y.shape[-1]) for y in outputs]

    def _present_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]

    def _fused_product(self, tokens: int, dtype: torch.dtype) -> _FusedProduct:
        product = self._fused.get((tokens, dtype))
        if product is None:
            product = self._fused[tokens, dtype] = _FusedProduct(self.members, tokens, dtype, self.overlap)
        return product

    def _library_product(self, dtype: torch.dtype) -> _LibraryProduct:
        if dtype not in self._by_library:
            self._by_library[dtype] = _LibraryProduct(self.members, dtype, self.overlap)
        return self._by_library[dtype]


class _FusedProduct:
    """A rotation and its products, for one number of tokens and one type: weights exist in registers alone."""

    def __init__(self, members: Sequence[PackedLinear], tokens: int, dtype: torch.dtype, overlap: bool) -> None:
        first, batch = members[0], batch_columns(tokens)
        self.tokens, self.device = tokens, first.codes.device
        self.value_bytes = 2 * batch * padded_columns(first.in_features)
        self.scratch_bytes = self.value_bytes + 4 * batch
        self.rotation = RotationLaunch(
            first.rotation, first.diagonal, first.in_features, tokens, batch, dtype, overlap=overlap
        )
        starts = list(accumulate((member.out_features for member in members), initial=0))
        self.products = [
            ProductLaunch(members[i : i + MOST_SEGMENTS], tokens, dtype, starts[i], starts[-1])
            for i in range(0, len(members), MOST_SEGMENTS)
        ]

    def __call__(self, x: int, y: int, stream: int) -> None:
        scratch = _scratch(self.device, stream, self.scratch_bytes)
        values = scratch.data_ptr()
        scales = values + self.value_bytes
        self.rotation.start(self.tokens, x, values, scales, stream)
        for product in self.products:
            product.start(values, scales, y, stream)


def _scratch(device: torch.device, stream: int, size: int) -> torch.Tensor:
    """`size` bytes or more that are the caller's until it has started its kernels: work on one stream is in order. What
    a graph is captured with has memory of its own."""
    if torch.cuda.is_current_stream_capturing():
        return torch.empty(size, dtype=torch.uint8, device=device)
    found = _scratches.get((device, stream))
    if found is None or len(found) < size:
        room = max(size, LEAST_SCRATCH_BYTES)
        found = _scratches[device, stream] = torch.empty(room, dtype=torch.uint8, device=device)
    return found


class _LibraryProduct:
    """Matrices decoded, slab by slab, and multiplied by the vendor's library, in x's own 16 bits: bfloat16, or float16,
    where a token that could leave its range is divided before and multiplied after. float32 goes through float16."""

    def __init__(self, members: Sequence[PackedLinear], dtype: torch.dtype, overlap: bool) -> None:
        first = members[0]
        self.columns, self.dtype = padded_columns(first.in_features), type_of_values(dtype, None)
        self.rotation = RotationLaunch(
            first.rotation, first.diagonal, first.in_features, MANY, None, dtype, overlap=overlap
        )
        most_tiles = max(1, SLAB_BYTES // (TILE * self.columns * self.dtype.itemsize))
        self.slabs = [
            (UnpackLaunch([part.source for part in parts], self.dtype), parts)
            for parts in cut_into_slabs(members, most_tiles)
        ]
        self.slab_rows = max(sum(part.source.rows for part in parts) for _, parts in self.slabs)
        self.rescale = RescaleLaunch(first.codes.device) if dtype == torch.float16 else None

    def __call__(self, x: torch.Tensor, tokens: int, outputs: Sequence[torch.Tensor], stream: int) -> None:
        values = torch.empty(tokens, self.columns, dtype=self.dtype, device=x.device)
        scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
        weight = torch.empty(self.slab_rows, self.columns, dtype=self.dtype, device=x.device)
        self.rotation.start(tokens, x.data_ptr(), values.data_ptr(), scales.data_ptr(), stream)
        for unpack, parts in self.slabs:
            unpack.start(weight.data_ptr(), stream)
            for part in parts:
                first, height = part.source.first_row, part.source.rows
                y = outputs[part.index]
                y = y if height == y.shape[1] else y[:, first : first + height]
                self._multiply(values, weight[part.place : part.place + height], y)
        self._rescale(scales, outputs, stream)

    def _multiply(self, values: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        if y.dtype == torch.float32:
            torch.mm(values, weight.T, out_dtype=torch.float32, out=y)
        else:
            torch.mm(values, weight.T, out=y)

    def _rescale(self, scales: torch.Tensor, products: Sequence[torch.Tensor], stream: int) -> None:
        if self.rescale is None:
            if self.dtype == torch.float16:
                for y in products:
                    y.mul_(scales[:, None])
            return
        for i in range(0, len(products), MOST_SEGMENTS):
            self.rescale.start(scales, products[i : i + MOST_SEGMENTS], stream)
