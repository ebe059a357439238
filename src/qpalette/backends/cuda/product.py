"""Products with packed matrices on a CUDA device, prepared: what does not change from call to call is made once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from qpalette.backends.cuda import multiply, teams
from qpalette.backends.cuda.int8 import Int8Product
from qpalette.backends.cuda.layout import check_layout
from qpalette.backends.cuda.library import LibraryProduct
from qpalette.backends.cuda.multiply import ProductLaunch
from qpalette.backends.cuda.rotate import ALIGNMENT, TYPES, RotationLaunch, aligned, padded_columns
from qpalette.backends.cuda.scratch import ONE_AT_A_TIME, scratch
from qpalette.backends.cuda.segments import MOST_SEGMENTS, DeviceLimits, device_limits
from qpalette.backends.cuda.teams import TeamLaunch
from qpalette.runtime import PackedLinear
from qpalette.runtime.prefill import FEW_TOKENS, FLOAT, INT8, road_of

BY_LIBRARY = {FLOAT: LibraryProduct, INT8: Int8Product}


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
        self._by_library: dict[tuple[str, torch.dtype], LibraryProduct] = {}

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One tensor [..., M] for each member, of x's dtype; contiguous where the library multiplies: torch's
        element-wise kernels for others took 2.8 of 45 ms of a prompt of 1024 tokens (Llama-3.1-8B, H100)."""
        if x.dtype not in TYPES:
            return [y.to(x.dtype) for y in self(x.float())]
        if not self._fuses(x.numel() // self.inputs):
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
        if not self._fuses(tokens):
            library_product = self._library_product(road_of(tokens, self.inputs), x.dtype)
            with ONE_AT_A_TIME:
                return library_product(x, tokens, y, stream)
        assert y is not None
        product = self._fused_product(tokens, x.dtype)
        with ONE_AT_A_TIME:
            product(x.data_ptr(), y.data_ptr(), stream)
        return []

    def _fuses(self, tokens: int) -> bool:
        return tokens <= most_fused_tokens(device_limits(self.index or 0)) and road_of(tokens, self.inputs) == FLOAT

    def _present_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]

    def _fused_product(self, tokens: int, dtype: torch.dtype) -> _FusedProduct:
        product = self._fused.get((tokens, dtype))
        if product is None:
            product = self._fused[tokens, dtype] = _FusedProduct(self.members, tokens, dtype, self.overlap)
        return product

    def _library_product(self, road: str, dtype: torch.dtype) -> LibraryProduct:
        if (road, dtype) not in self._by_library:
            self._by_library[road, dtype] = BY_LIBRARY[road](self.members, dtype, self.overlap)
        return self._by_library[road, dtype]


class _FusedProduct:
    """A rotation and its products, for one number of tokens and one type: weights exist in registers alone."""

    def __init__(self, members: Sequence[PackedLinear], tokens: int, dtype: torch.dtype, overlap: bool) -> None:
        first = members[0]
        self.tokens, self.device = tokens, first.codes.device
        limits = device_limits(self.device.index or 0)
        in_teams = teams.serves(tokens, limits)
        lots, batch = columns_of(tokens, limits)
        launch = TeamLaunch if in_teams else ProductLaunch
        starts = list(accumulate((member.out_features for member in members), initial=0))
        self.products: list[TeamLaunch | ProductLaunch] = [
            launch(members[i : i + MOST_SEGMENTS], tokens, dtype, starts[i], starts[-1])
            for i in range(0, len(members), MOST_SEGMENTS)
        ]
        zero_bytes = sum(product.zero_bytes for product in self.products)
        self.rotation = RotationLaunch(
            first.rotation,
            first.diagonal,
            first.in_features,
            tokens,
            batch,
            dtype,
            overlap=overlap,
            cores=in_teams,
            zero_bytes=zero_bytes,
        )
        self.value_bytes = 2 * lots * batch * padded_columns(first.in_features)
        self.scale_bytes = -(-4 * lots * batch // ALIGNMENT) * ALIGNMENT
        self.scratch_bytes = self.value_bytes + self.scale_bytes + zero_bytes

    def __call__(self, x: int, y: int, stream: int) -> None:
        values = scratch(self.device, stream, self.scratch_bytes).data_ptr()
        scales = values + self.value_bytes
        zeros = scales + self.scale_bytes
        self.rotation.start(self.tokens, x, values, scales, stream, zeros=zeros)
        for product in self.products:
            product.start(values, scales, y, stream, zeros)
            zeros += product.zero_bytes


def most_fused_tokens(limits: DeviceLimits) -> int:
    """More of them are multiplied by cuBLAS, and matrices decoded to memory for it."""
    return teams.MOST_TOKENS if teams.serves(teams.MOST_TOKENS, limits) else FEW_TOKENS


def columns_of(tokens: int, limits: DeviceLimits) -> tuple[int, int]:
    """(lots, columns of each) of the product of so many tokens."""
    return teams.columns_of(tokens) if teams.serves(tokens, limits) else multiply.columns_of(tokens)
