"""The parts of a packed matrix, declared once: reader, writer, card, buffers, cuts and random models derive from it.

W = scale * decode(codes) * Q * diag(d), with Q the rotation: codes, one scale per row, and the input's diagonal d, a
sign or a float16 per input. Integer types throughout: no `.to(dtype)` of a framework ever rounds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod

import torch

from qpalette.codes import parse_spec
from qpalette.core.errors import ArtifactError
from qpalette.core.records import FLOAT16, SIGNS, TILE, TILE_WEIGHTS, LinearRecord, PackedBits
from qpalette.rotate import pack_signs, random_signs, unpack_signs
from qpalette.runtime import PackedLinear

ROWS, COLUMNS, WORDS = "rows", "columns", "words"
RANDOM_SCALE = 0.02  # of random weights: the usual initialization, so that activations stay finite
PREFIX = "qp_"  # of the last name of every part, and of no other tensor


@dataclass(frozen=True)
class Axis:
    """What a dimension of a part runs over: ROWS (out-features) or COLUMNS (in-features), `unit` of them in an element,
    or the WORDS of a tile."""

    over: str
    unit: int = 1

    def size(self, rows: int, columns: int, words: int) -> int:
        return -(-{ROWS: rows, COLUMNS: columns, WORDS: words}[self.over] // self.unit)


@dataclass(frozen=True)
class Part:
    """One stored tensor of a packed matrix.

    suffix: NAME.suffix in a file, and the buffer's name in a module. field: of `runtime.PackedLinear`, which it fills.
    title: for people. axes: of the tensor. diagonal: the kind of `LinearRecord.diagonal` that has it; None: all have.
    random: (record, device) -> valid values. problem: (tensor, record) -> what is wrong with the values, or None.
    """

    suffix: str
    field: str
    title: str
    dtype: torch.dtype
    axes: tuple[Axis, ...]
    random: Callable[[LinearRecord, torch.device], torch.Tensor]
    problem: Callable[[torch.Tensor, LinearRecord], str | None] = lambda tensor, record: None
    diagonal: str | None = None

    def shape(self, record: LinearRecord) -> tuple[int, ...]:
        return self._shape(record.out_features, record.in_features, parse_spec(record.spec).words_per_tile)

    def bits(self, rate: Fraction, out_features: int, in_features: int) -> int:
        """Of a matrix whose codes have `rate`; padding counts."""
        words = rate * TILE_WEIGHTS / 32
        assert words.denominator == 1, "a tile holds whole words at every multiple of 1/8 bit"
        return 8 * self.dtype.itemsize * prod(self._shape(out_features, in_features, int(words)))

    def _shape(self, rows: int, columns: int, words: int) -> tuple[int, ...]:
        return tuple(axis.size(rows, columns, words) for axis in self.axes)


def _not_finite(tensor: torch.Tensor, record: LinearRecord) -> str | None:
    return None if bool(tensor.view(torch.float16).isfinite().all()) else "has a value that is not finite"


def _stray_bits(tensor: torch.Tensor, record: LinearRecord) -> str | None:
    try:
        unpack_signs(tensor, record.in_features)
    except ArtifactError as error:
        return f"is damaged: {error}"
    return None


def _random_codes(record: LinearRecord, device: torch.device) -> torch.Tensor:
    return torch.randint(-(1 << 31), 1 << 31, CODES.shape(record), dtype=torch.int32, device=device)


def _random_scales(record: LinearRecord, device: torch.device) -> torch.Tensor:
    return torch.full(SCALES.shape(record), RANDOM_SCALE, dtype=torch.float16, device=device).view(torch.int16)


def _random_signs(record: LinearRecord, device: torch.device) -> torch.Tensor:
    return pack_signs(random_signs(record.in_features, record.seed, record.group)).to(device)


def _random_diagonal(record: LinearRecord, device: torch.device) -> torch.Tensor:
    return random_signs(record.in_features, record.seed, record.group).half().view(torch.int16).to(device)


CODES = Part(
    suffix="qp_codes",
    field="codes",
    title="codes",
    dtype=torch.int32,
    axes=(Axis(ROWS, TILE), Axis(COLUMNS, TILE), Axis(WORDS)),
    random=_random_codes,
)
SCALES = Part(  # the bits of one float16 per row
    suffix="qp_scales",
    field="scales",
    title="row scales",
    dtype=torch.int16,
    axes=(Axis(ROWS),),
    problem=_not_finite,
    random=_random_scales,
)
SIGN_BITS = Part(  # one bit per input, 1 for -1, lowest first
    suffix="qp_signs",
    field="diagonal",
    title="rotation signs",
    dtype=torch.uint8,
    axes=(Axis(COLUMNS, 8),),
    diagonal=SIGNS,
    problem=_stray_bits,
    random=_random_signs,
)
DIAGONAL = Part(  # the bits of one float16 per input
    suffix="qp_diagonal",
    field="diagonal",
    title="input diagonal",
    dtype=torch.int16,
    axes=(Axis(COLUMNS),),
    diagonal=FLOAT16,
    problem=_not_finite,
    random=_random_diagonal,
)
PARTS = (CODES, SCALES, SIGN_BITS, DIAGONAL)


def parts_of(record: LinearRecord) -> tuple[Part, ...]:
    """What is stored of a linear."""
    return _parts_of(record.diagonal)


def _parts_of(diagonal: str) -> tuple[Part, ...]:
    return tuple(part for part in PARTS if part.diagonal in (None, diagonal))


def expected_tensors(record: LinearRecord) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of the tensors that a linear stores."""
    return {part.suffix: (part.dtype, part.shape(record)) for part in parts_of(record)}


def packed_bits(rate: Fraction, out_features: int, in_features: int, diagonal: str = SIGNS) -> PackedBits:
    """Exact stored bits of an (out_features x in_features) linear whose codes have `rate`, part by part."""
    parts = {part.suffix: part.bits(rate, out_features, in_features) for part in _parts_of(diagonal)}
    return PackedBits(out_features * in_features, parts)


def counted_bits(record: LinearRecord) -> PackedBits:
    """What the tensors of a linear cost, part by part."""
    return packed_bits(parse_spec(record.spec).rate, record.out_features, record.in_features, record.diagonal)


def total_bits(records: Iterable[LinearRecord]) -> PackedBits:
    """Sum over linears, part by part."""
    return PackedBits.sum(map(counted_bits, records))


def packed_linear_of(record: LinearRecord, tensors: Mapping[str, torch.Tensor]) -> PackedLinear:
    """A matrix as the kernels take it, from its stored tensors by suffix."""
    fields = {part.field: tensors[part.suffix] for part in parts_of(record)}
    names = (record.spec, record.rotation, record.out_features, record.in_features)
    return PackedLinear(fields["codes"], fields["scales"], fields["diagonal"], *names)


def check_values(name: str, record: LinearRecord, tensors: Mapping[str, torch.Tensor]) -> None:
    """What headers cannot show. Raises ArtifactError naming the tensor."""
    for part in parts_of(record):
        if (problem := part.problem(tensors[part.suffix], record)) is not None:
            raise ArtifactError(f"{name}.{part.suffix} {problem}; download the model again")


def is_part(tensor: str) -> bool:
    """Whether a tensor's name is that of a part of some linear."""
    return tensor.rpartition(".")[2].startswith(PREFIX)
