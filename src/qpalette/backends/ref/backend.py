"""Every operation of the contract in a few obvious lines of torch."""

from __future__ import annotations

import torch

from qpalette.codes import parse_spec
from qpalette.codes.tiles import from_tiles
from qpalette.rotate import Rotation, diagonal_of, unrotate_weight
from qpalette.runtime import Backend, ExpertsProduct, PackedExperts, PackedLinear, Verdict
from qpalette.runtime.prefill import INT8, product_in_int8, road_of, tokens_in_int8, weights_in_int8


class ReferenceBackend(Backend):
    name = "ref"
    priority = 0
    fuses = True
    in_int8 = True

    def supports(self, operation: str, spec: str, device: torch.device) -> Verdict:
        return Verdict(True)

    def encode(self, spec: str, tiles: torch.Tensor) -> torch.Tensor:
        return parse_spec(spec).encode(tiles)

    def decode(self, spec: str, codes: torch.Tensor) -> torch.Tensor:
        return parse_spec(spec).decode(codes)

    def linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        rotation = Rotation.parse(packed.rotation, packed.in_features)
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        rotated = rotation.apply(work * diagonal_of(packed.diagonal, packed.in_features))
        if road_of(len(x), packed.in_features) == INT8:
            weights = weights_in_int8(self._unscaled(packed), packed.spec)
            return product_in_int8(tokens_in_int8(rotated), weights, _row_scales(packed)).to(x.dtype)
        return (rotated @ self.rotated_weight(packed).T.to(rotated.dtype)).to(x.dtype)

    def experts(self, experts: PackedExperts) -> ExpertsProduct:
        """All experts are decoded and each token is computed alone: nobody waits for the index, and a token's bits are
        its own."""

        def run(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            work = x.to(torch.promote_types(x.dtype, torch.float32))
            first = torch.stack([torch.cat([self._weight(each) for each in matrices]) for matrices in experts.first])
            last = torch.stack([self._weight(matrix) for matrix in experts.last])
            dense = first.to(work.dtype), last.to(work.dtype)
            results = [_of_token(*token, *dense, experts) for token in zip(work, index, weights, strict=True)]
            return torch.stack(results).to(x.dtype) if results else x.clone()

        return run

    def _weight(self, packed: PackedLinear) -> torch.Tensor:
        columns = packed.in_features
        rotation, diagonal = Rotation.parse(packed.rotation, columns), diagonal_of(packed.diagonal, columns)
        return unrotate_weight(self.rotated_weight(packed), rotation, diagonal)

    def rotated_weight(self, packed: PackedLinear) -> torch.Tensor:
        return self._unscaled(packed) * _row_scales(packed)[:, None]

    def _unscaled(self, packed: PackedLinear) -> torch.Tensor:
        rows, columns, words = packed.codes.shape
        tiles = self.decode(packed.spec, packed.codes.reshape(-1, words)).reshape(rows, columns, -1)
        return from_tiles(tiles, packed.out_features, packed.in_features)


def _row_scales(packed: PackedLinear) -> torch.Tensor:
    return packed.scales.view(torch.float16).float()


def _of_token(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    experts: PackedExperts,
) -> torch.Tensor:
    """x [K], index and weights [k], the weights of all experts [E, F, K] and [E, K, I] -> [K]."""
    exists = (index >= 0) & (index < len(last))
    chosen = index.where(exists, 0)
    inner = first[chosen] @ x.clone()  # a copy: sums may be ordered by where in memory a vector starts
    if experts.first_bias is not None:
        inner = inner + experts.first_bias[chosen]
    outputs = (last[chosen] @ experts.gate(inner)[:, :, None])[:, :, 0]
    if experts.last_bias is not None:
        outputs = outputs + experts.last_bias[chosen]
    return (outputs * weights[:, None]).where(exists[:, None], 0).sum(0)
