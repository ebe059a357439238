"""An embedding whose table stays packed, and the output head that is tied to it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import nn

from qpalette.codes import parse_spec
from qpalette.codes.tiles import scan_order
from qpalette.core.errors import InputError
from qpalette.core.records import TILE, TILE_WEIGHTS, LinearRecord, tiles_of
from qpalette.nn.packed_module import PackedModule
from qpalette.nn.packed_weight import PackedWeight
from qpalette.nn.quant_linear import QuantLinear
from qpalette.rotate import Rotation, diagonal_of
from qpalette.runtime import TILES, Backend, PackedLinear, backend_for
from qpalette.runtime.door import check_ids, check_packed

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CHUNK_WEIGHTS = 1 << 22  # decoded at a time: whole tiles, of which a lookup keeps a sixteenth


class QuantEmbedding(PackedModule):
    """Stands in for an `nn.Embedding` of [M, K]; ids [...] -> rows [..., K], of the type that a cast of the model set.

    A lookup decodes the tiles of its rows alone. `factor` multiplies every row, as Gemma's embedding does.
    `multiplied`: an output head shares the table (`TiedHead`), so that it is laid out for products.
    """

    def __init__(
        self,
        record: LinearRecord,
        factor: float = 1.0,
        multiplied: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(record, dtype, device)
        self.num_embeddings = record.out_features
        self.embedding_dim = record.in_features
        # Rounded to the type, as transformers does.
        self.factors = {dtype: torch.tensor(factor, dtype=dtype, device="cpu").item() for dtype in FLOATS}
        self.multiplied = multiplied

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = packed_rows(ids, self.packed)
        return rows.to(self.type_of.dtype) * self.factors[self.type_of.dtype]

    def _lay_out(self, backend: Backend) -> None:
        if self.multiplied:
            super()._lay_out(backend)

    def dequantize(self, dtype: torch.dtype) -> nn.Embedding:
        """The ordinary module that computes the same, its table rounded once to `dtype`."""
        embedding = ScaledEmbedding(self.num_embeddings, self.embedding_dim, self.factors)
        embedding.weight = nn.Parameter(self.dequantized_weight().to(dtype))
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.packed_repr()}"


class ScaledEmbedding(nn.Embedding):
    """An `nn.Embedding` whose rows are multiplied by a factor, given for each type."""

    def __init__(self, rows: int, dim: int, factors: Mapping[torch.dtype, float]) -> None:
        super().__init__(rows, dim, device="meta")
        self.factors = factors

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.factors[self.weight.dtype]


class TiedHead(nn.Module):
    """The output head that multiplies by an embedding's table, which is not stored twice; its bias is its own."""

    bias: nn.Parameter | None

    def __init__(self, embedding: QuantEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self._embedding = (embedding,)  # in a tuple: not a child
        self.register_parameter("bias", bias)

    @property
    def embedding(self) -> QuantEmbedding:
        return self._embedding[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.embedding.multiply(x.to(self.embedding.qp_codes.device)).to(x.device)
        return result if self.bias is None else result + self.bias

    @property
    def weight(self) -> PackedWeight:
        return self.embedding.weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied to a packed embedding"


class TiedLinear(nn.Module):
    """A linear whose weight is that of another packed one; its bias is its own."""

    bias: nn.Parameter | None

    def __init__(self, linear: QuantLinear, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._linear = (linear,)  # in a tuple: not a child
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> PackedWeight:
        return self._linear[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self._linear[0].multiply(x)
        return result if self.bias is None else result + self.bias


def packed_rows(ids: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """Rows `ids` [...] of a packed matrix [M, K] in the basis of the checkpoint, float32 [..., K]; where
    `packed.scales` or `packed.diagonal` is a floating tensor, differentiable in it.

    Raises InputError for ids that are no integers or a matrix that is not what its sizes say, and IndexError for an id
    out of range on the CPU; a CUDA device asserts it.
    """
    inner, scales, diagonal = packed, packed.scales, packed.diagonal
    if scales.is_floating_point():
        inner = inner.with_(scales=torch.ones_like(scales, dtype=torch.float16).view(torch.int16))
    if diagonal.is_floating_point():
        inner = inner.with_(diagonal=torch.zeros(-(-len(diagonal) // 8), dtype=torch.uint8, device=diagonal.device))
    names, shape = (inner.spec, inner.rotation, inner.layout), (inner.out_features, inner.in_features)
    rows = torch.ops.qpalette.embedding(ids, inner.codes, inner.scales, inner.diagonal, *names, *shape)
    rows = rows * scales[ids, None] if scales.is_floating_point() else rows
    return rows * diagonal if diagonal.is_floating_point() else rows


@torch.library.custom_op("qpalette::embedding", mutates_args=())
def _embedding(
    ids: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    diagonal: torch.Tensor,
    spec: str,
    rotation: str,
    layout: str,
    rows: int,
    dim: int,
) -> torch.Tensor:
    """Rows of the packed matrix in the basis of the checkpoint, float32 [..., dim]."""
    packed = PackedLinear(codes, scales, diagonal, spec, rotation, rows, dim, layout)
    check_packed(packed)
    if ids.device != codes.device:
        raise InputError(f"the ids are on {ids.device}, the packed embedding on {codes.device}: move one of them")
    check_ids(ids, rows)
    backend = backend_for(layout, spec, codes.device)
    wanted, place = ids.reshape(-1).long(), None
    if ids.device.type == "cpu":  # words repeat; elsewhere a size that depends on values would stop a CUDA graph
        wanted, place = wanted.unique(return_inverse=True)
    chunks = wanted.split(max(1, CHUNK_WEIGHTS // (TILE_WEIGHTS * tiles_of(dim))))
    rotated = torch.cat([_rotated_rows(chunk, packed, backend) for chunk in chunks])
    original = Rotation.parse(rotation, dim).inverse(rotated) * diagonal_of(diagonal, dim)
    return (original if place is None else original[place]).reshape(*ids.shape, dim)


@_embedding.register_fake
def _embedding_shape(
    ids: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    diagonal: torch.Tensor,
    spec: str,
    rotation: str,
    layout: str,
    rows: int,
    dim: int,
) -> torch.Tensor:
    return ids.new_empty(*ids.shape, dim, dtype=torch.float32)


def _rotated_rows(ids: torch.Tensor, packed: PackedLinear, backend: Backend) -> torch.Tensor:
    """Rows of W', float32 [ids, K]. No step depends on the values of `ids`, so that a CUDA graph can hold them all."""
    columns, words = tiles_of(packed.in_features), parse_spec(packed.spec).words_per_tile
    stored_shape = (tiles_of(packed.out_features), columns, words)
    rows = ids // TILE
    if packed.layout == TILES:
        codes = packed.codes[rows]
    else:
        codes = backend.tile_rows(packed.codes, rows, packed.spec, stored_shape)
    tiles = backend.decode(packed.spec, codes.reshape(-1, words)).reshape(len(ids), columns, TILE_WEIGHTS)
    steps = _steps_of_rows(ids.device)[ids % TILE]
    unscaled = tiles.gather(2, steps[:, None].expand(-1, columns, -1)).flatten(1)
    return unscaled[:, : packed.in_features] * packed.scales.view(torch.float16).float()[ids, None]


@lru_cache(maxsize=16)
def _steps_of_rows(device: torch.device) -> torch.Tensor:
    """Where in the scan each weight of a tile is, int64 [row, column]."""
    row, column = scan_order(device)
    steps = torch.empty(TILE, TILE, dtype=torch.int64, device=device)
    steps[row, column] = torch.arange(TILE_WEIGHTS, device=device)
    return steps
