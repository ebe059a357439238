"""Products with packed matrices on a CUDA device, prepared: what does not change from call to call is made once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from qpalette.backends.cuda.layout import check_layout
from qpalette.backends.cuda.multiply import ProductLaunch, columns_of
from qpalette.backends.cuda.rotate import ALIGNMENT, TYPES, RotationLaunch, aligned, padded_columns, type_of_values
from qpalette.backends.cuda.scratch import ONE_AT_A_TIME, scratch
from qpalette.backends.cuda.segments import MOST_SEGMENTS
from qpalette.backends.cuda.unpack import SLAB_BYTES, RescaleLaunch, UnpackLaunch, cut_into_slabs
from qpalette.core.records import TILE
from qpalette.runtime import PackedLinear

# Above so many tokens matrices are decoded and multiplied by cuBLAS.
MOST_FUSED_TOKENS = 128
MANY = 1 << 16  # tokens: a rotation is cut alike for any number above MOST_FUSED_TOKENS


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
        if x.dtype not in TYPES:
            return [y.to(x.dtype) for y in self(x.float())]
        if x.numel() > MOST_FUSED_TOKENS * self.inputs:
            return [y.view(*x.shape[:-1], rows) for y, rows in zip(self._start(x, None), self.rows, strict=True)]
        result = self.joined(x)
        return [result] if len(self.rows) == 1 else list(result.split(self.rows, -1))

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """[..., sum of M], side by side."""
        if x.dtype not in TYPES:
            return self.joined(x.float()).to(x.dtype)
        result = x.new_empty((*x.shape[:-1], self.width))
        self._start(x, result)
        return result

    def _start(self, x: torch.Tensor, y: torch.Tensor | None) -> list[torch.Tensor]:
        """Into y, side by side, or else into one [tokens, M] for each member, which are returned."""
        if not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
            x = aligned(x.contiguous())
        if self._present_addresses() != self._addresses:
            self._fused, self._by_library, self._addresses = {}, {}, self._present_addresses()
        if torch.cuda.current_device() == self.index:
            return self._run(x, y)
        with torch.cuda.device(self.index):  # launches go to the current device
            return self._run(x, y)

    def _run(self, x: torch.Tensor, y: torch.Tensor | None) -> list[torch.Tensor]:
        tokens = x.numel() // self.inputs
        stream = torch._C._cuda_getCurrentRawStream(self.index)  # no object of it, as torch.compile's code
        if tokens > MOST_FUSED_TOKENS:
            library_product = self._library_product(x.dtype)
            with ONE_AT_A_TIME:
                return library_product(x, tokens, y, stream)
        assert y is not None
        product = self._fused_product(tokens, x.dtype)
        with ONE_AT_A_TIME:
            product(x.data_ptr(), y.data_ptr(), stream)
        return []

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
        first = members[0]
        self.tokens, self.device = tokens, first.codes.device
        lots, batch = columns_of(tokens)
        self.value_bytes = 2 * lots * batch * padded_columns(first.in_features)
        self.scratch_bytes = self.value_bytes + 4 * lots * batch
        self.rotation = RotationLaunch(
            first.rotation, first.diagonal, first.in_features, tokens, batch, dtype, overlap=overlap
        )
        starts = list(accumulate((member.out_features for member in members), initial=0))
        self.products = [
            ProductLaunch(members[i : i + MOST_SEGMENTS], tokens, dtype, starts[i], starts[-1])
            for i in range(0, len(members), MOST_SEGMENTS)
        ]

    def __call__(self, x: int, y: int, stream: int) -> None:
        values = scratch(self.device, stream, self.scratch_bytes).data_ptr()
        scales = values + self.value_bytes
        self.rotation.start(self.tokens, x, values, scales, stream)
        for product in self.products:
            product.start(values, scales, y, stream)


class _LibraryProduct:
    """Matrices decoded, slab by slab, and multiplied by the vendor's library, in x's own 16 bits: bfloat16, or float16,
    where a token that could leave its range is divided before and multiplied after. float32 goes through float16."""

    def __init__(self, members: Sequence[PackedLinear], dtype: torch.dtype, overlap: bool) -> None:
        first = members[0]
        self.columns, self.dtype = padded_columns(first.in_features), type_of_values(dtype, None)
        self.device, self.wide = first.codes.device, dtype == torch.float32
        self.rows = [member.out_features for member in members]
        self.rotation = RotationLaunch(
            first.rotation, first.diagonal, first.in_features, MANY, None, dtype, overlap=overlap
        )
        row_bytes = self.columns * self.dtype.itemsize
        slabs = cut_into_slabs(members, max(1, SLAB_BYTES // (TILE * row_bytes)))
        self.slabs = [(UnpackLaunch([part.source for part in parts], self.dtype), parts) for parts in slabs]
        self.slab_bytes = row_bytes * max(sum(part.source.rows for part in parts) for parts in slabs)
        self.in_pieces = {part.index for parts in slabs for part in parts if part.source.rows < self.rows[part.index]}
        self.rescale = RescaleLaunch(self.device) if dtype == torch.float16 else None
        self._views: tuple[int, list[list[torch.Tensor]]] = (0, [])

    def __call__(self, x: torch.Tensor, tokens: int, joined: torch.Tensor | None, stream: int) -> list[torch.Tensor]:
        """x of `tokens` rows -> [tokens, M] of each member, in `joined` [..., sum of M], or where torch puts them."""
        values = torch.empty(tokens, self.columns, dtype=self.dtype, device=self.device)
        room = scratch(self.device, stream, self.slab_bytes + 4 * tokens)
        slabs, scales = self._weights(room), room.data_ptr() + self.slab_bytes
        self.rotation.start(tokens, x.data_ptr(), values.data_ptr(), scales, stream)
        outputs = self._outputs(tokens, x.dtype, joined)
        for (unpack, parts), weights in zip(self.slabs, slabs, strict=True):
            unpack.start(room.data_ptr(), stream)
            for part, weight in zip(parts, weights, strict=True):
                y = outputs[part.index]
                if y is None:
                    outputs[part.index] = self._multiply(values, weight)
                else:
                    first = part.source.first_row
                    self._multiply(values, weight, y[:, first : first + part.source.rows])
        products = [y for y in outputs if y is not None]
        self._rescale(room[self.slab_bytes : self.slab_bytes + 4 * tokens].view(torch.float32), products, stream)
        return products

    def _outputs(self, tokens: int, dtype: torch.dtype, joined: torch.Tensor | None) -> list[torch.Tensor | None]:
        """[tokens, M] of each member; None where one product makes all of it."""
        if joined is not None:
            return list(joined.view(tokens, -1).split(self.rows, dim=1))
        return [
            torch.empty(tokens, rows, dtype=dtype, device=self.device) if index in self.in_pieces else None
            for index, rows in enumerate(self.rows)
        ]

    def _weights(self, room: torch.Tensor) -> list[list[torch.Tensor]]:
        """Of each part of each slab, transposed, where `room` is; kept, as making them takes the host as long as
        starting a kernel does."""
        address = room.data_ptr()
        if self._views[0] == address:
            return self._views[1]
        weight = room[: self.slab_bytes].view(self.dtype).view(-1, self.columns)
        places = [[(part.place, part.place + part.source.rows) for part in parts] for _, parts in self.slabs]
        views = [[weight[first:end].T for first, end in slab] for slab in places]
        if not torch.cuda.is_current_stream_capturing():  # a graph's memory is its own
            self._views = (address, views)
        return views

    def _multiply(self, values: torch.Tensor, weight: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return torch.mm(values, weight, torch.float32, out=y) if self.wide else torch.mm(values, weight, out=y)

    def _rescale(self, scales: torch.Tensor, products: Sequence[torch.Tensor], stream: int) -> None:
        if self.wide:
            for y in products:
                y.mul_(scales[:, None])
        elif self.rescale is not None:
            for i in range(0, len(products), MOST_SEGMENTS):
                self.rescale.start(scales, products[i : i + MOST_SEGMENTS], stream)
