"""More tokens than a fused product takes: matrices decoded, slab by slab, and multiplied by the vendor's library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch

from qpalette.backends.cuda.rotate import RotationLaunch, padded_columns, type_of_values
from qpalette.backends.cuda.scratch import scratch
from qpalette.backends.cuda.segments import MOST_SEGMENTS
from qpalette.backends.cuda.unpack import SLAB_BYTES, Part, RescaleLaunch, UnpackLaunch, cut_into_slabs
from qpalette.core.records import TILE
from qpalette.runtime import PackedLinear

MANY = 1 << 16  # tokens: a rotation is cut alike for any number that the library multiplies


class Tokens(NamedTuple):
    """Rotated ones [N, padded K], and float32 [N] that their products want to be multiplied by."""

    values: torch.Tensor
    scales: torch.Tensor


class LibraryProduct:
    """In x's own 16 bits: bfloat16, or float16, where a token that could leave its range is divided before and
    multiplied after. float32 goes through float16."""

    type_of_weights: ClassVar[torch.dtype | None] = None  # None: that of rotated tokens

    def __init__(self, members: Sequence[PackedLinear], dtype: torch.dtype, overlap: bool) -> None:
        first = members[0]
        self.columns, self.type_of_values = padded_columns(first.in_features), type_of_values(dtype, None)
        self.weight_type = self.type_of_weights or self.type_of_values
        self.device, self.wide = first.codes.device, dtype == torch.float32
        self.rows = [member.out_features for member in members]
        self.rotation = RotationLaunch(
            first.rotation, first.diagonal, first.in_features, MANY, None, dtype, overlap=overlap
        )
        row_bytes = self.columns * self.weight_type.itemsize
        slabs = cut_into_slabs(members, max(1, SLAB_BYTES // (TILE * row_bytes)))
        self.slabs = [(UnpackLaunch([part.source for part in parts], self.weight_type), parts) for parts in slabs]
        self.slab_bytes = row_bytes * max(sum(part.source.height for part in parts) for parts in slabs)
        self.in_pieces = {part.index for parts in slabs for part in parts if part.source.rows < self.rows[part.index]}
        self.rescale = RescaleLaunch(self.device) if dtype == torch.float16 else None
        self._views: tuple[int, list[list[torch.Tensor]]] = (0, [])

    def __call__(self, x: torch.Tensor, tokens: int, joined: torch.Tensor | None, stream: int) -> list[torch.Tensor]:
        """x of `tokens` rows -> [tokens, M] of each member, in `joined` [..., sum of M], or where torch puts them."""
        values = torch.empty(tokens, self.columns, dtype=self.type_of_values, device=self.device)
        room = scratch(self.device, stream, self.slab_bytes + 4 * tokens)
        slabs, scales = self._weights(room), room[self.slab_bytes : self.slab_bytes + 4 * tokens].view(torch.float32)
        self.rotation.start(tokens, x.data_ptr(), values.data_ptr(), scales.data_ptr(), stream)
        rotated = self._prepared(Tokens(values, scales), stream)
        outputs = self._outputs(tokens, x.dtype, joined)
        for (unpack, parts), weights in zip(self.slabs, slabs, strict=True):
            unpack.start(room.data_ptr(), stream)
            for part, weight in zip(parts, weights, strict=True):
                y = outputs[part.index]
                if y is not None:
                    y = y[:, part.source.first_row : part.source.first_row + part.source.rows]
                result = self._multiply(rotated, weight, part, y, stream)
                if outputs[part.index] is None:
                    outputs[part.index] = result
        products = [y for y in outputs if y is not None]
        self._finish(rotated, products, stream)
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
        weight = room[: self.slab_bytes].view(self.weight_type).view(-1, self.columns)
        views = [[weight[part.place : part.place + self._height(part)].T for part in parts] for _, parts in self.slabs]
        if not torch.cuda.is_current_stream_capturing():  # a graph's memory is its own
            self._views = (address, views)
        return views

    def _height(self, part: Part) -> int:
        """Of what is multiplied."""
        return part.source.rows

    def _prepared(self, tokens: Tokens, stream: int) -> Tokens:
        return tokens

    def _multiply(
        self, tokens: Tokens, weight: torch.Tensor, part: Part, y: torch.Tensor | None, stream: int
    ) -> torch.Tensor:
        """Into y, where that is there."""
        if self.wide:
            return torch.mm(tokens.values, weight, torch.float32, out=y)
        return torch.mm(tokens.values, weight, out=y)

    def _finish(self, tokens: Tokens, products: Sequence[torch.Tensor], stream: int) -> None:
        if self.wide:
            for y in products:
                y.mul_(tokens.scales[:, None])
        elif self.rescale is not None:
            for i in range(0, len(products), MOST_SEGMENTS):
                self.rescale.start(tokens.scales, products[i : i + MOST_SEGMENTS], stream)
