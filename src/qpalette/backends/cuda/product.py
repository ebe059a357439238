"""Products with packed matrices on a CUDA device, prepared: what does not change from call to call is made once."""

from __future__ import annotations

import threading
from collections.abc import Sequence

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
        self.device, self.inputs = first.codes.device, first.in_features
        self.rows = [member.out_features for member in members]
        self._tensors = [first.diagonal, *(tensor for member in members for tensor in (member.codes, member.scales))]
        self._addresses = self._present_addresses()
        self._fused: dict[tuple[int, torch.dtype], _FusedProduct] = {}
        self._by_library: dict[torch.dtype, _LibraryProduct] = {}
        self._lock = threading.Lock()  # the arguments of a launch are one block of memory

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One tensor [..., M] for each member, of x's dtype."""
        shape = x.shape[:-1]
        outputs = [x.new_empty((*shape, rows)) for rows in self.rows]
        self._fill(x, outputs)
        return outputs

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """[..., sum of M], side by side."""
        result = x.new_empty((*x.shape[:-1], sum(self.rows)))
        self._fill(x, list(result.split(self.rows, dim=-1)))
        return result

    def _fill(self, x: torch.Tensor, outputs: list[torch.Tensor]) -> None:
        if x.dtype not in TYPES:
            for y, wider in zip(outputs, self(x.float()), strict=True):
                y.copy_(wider)
            return
        tokens, current = x.numel() // self.inputs, torch.cuda.current_device()
        if tokens == 0:
            return
        if not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
            x = aligned(x.contiguous())
        if current != self.device.index:  # launches go to the current device
            with torch.cuda.device(self.device):
                self._run(x, tokens, outputs)
        else:
            self._run(x, tokens, outputs)

    def _run(self, x: torch.Tensor, tokens: int, outputs: list[torch.Tensor]) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)  # as torch.compile's code: 0.1 us, not 3
        with self._lock:
            if self._present_addresses() != self._addresses:
                self._fused, self._by_library, self._addresses = {}, {}, self._present_addresses()
            if tokens > MOST_FUSED_TOKENS:
                self._library_product(x.dtype)(x, tokens, outputs, stream)
                return
            places = [(y.data_ptr(), y.stride(-2) if y.dim() > 1 else 0) for y in outputs]
            for start in range(0, tokens, MOST_BATCH):
                product = self._fused_product(min(MOST_BATCH, tokens - start), x.dtype)
                size = x.dtype.itemsize
                part = [(address + start * stride * size, stride) for address, stride in places] if start else places
                product(x, x.data_ptr() + start * self.inputs * size, part, stream)

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
        self.tokens = tokens
        self.value_bytes = 2 * batch * padded_columns(first.in_features)
        self.scratch_bytes = self.value_bytes + 4 * batch
        self.rotation = RotationLaunch(
            first.rotation, first.diagonal, first.in_features, tokens, batch, dtype, overlap=overlap
        )
        launches = [members[i : i + MOST_SEGMENTS] for i in range(0, len(members), MOST_SEGMENTS)]
        self.products = [ProductLaunch(launch, tokens, dtype) for launch in launches]

    def __call__(self, x: torch.Tensor, address: int, outputs: Sequence[tuple[int, int]], stream: int) -> None:
        scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=x.device)
        values = scratch.data_ptr()
        scales = values + self.value_bytes
        self.rotation.start(self.tokens, address, values, scales, stream)
        for i, product in enumerate(self.products):
            product.start(values, scales, outputs[i * MOST_SEGMENTS : (i + 1) * MOST_SEGMENTS], stream)


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
        self.slab_rows = max(sum(part.rows for part in parts) for _, parts in self.slabs)
        self.rescale = RescaleLaunch(first.codes.device) if dtype == torch.float16 else None

    def __call__(self, x: torch.Tensor, tokens: int, outputs: Sequence[torch.Tensor], stream: int) -> None:
        values = torch.empty(tokens, self.columns, dtype=self.dtype, device=x.device)
        scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
        weight = torch.empty(self.slab_rows, self.columns, dtype=self.dtype, device=x.device)
        products = [y.view(tokens, y.shape[-1]) for y in outputs]
        self.rotation.start(tokens, x.data_ptr(), values.data_ptr(), scales.data_ptr(), stream)
        for unpack, parts in self.slabs:
            unpack.start(weight.data_ptr(), stream)
            for part in parts:
                y = products[part.index]
                y = y if part.rows == y.shape[1] else y[:, part.first_row : part.first_row + part.rows]
                self._multiply(values, weight[part.place : part.place + part.rows], y)
        self._rescale(scales, products, stream)

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
