"""One linear, from float weights to packed tensors: rotate, normalise rows, encode, refit the row scales."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch

from qpalette.calibration.hessians import row_blocks
from qpalette.codes.tiles import from_tiles, to_tiles
from qpalette.core.errors import CheckpointError, InputError
from qpalette.core.records import TILE, LinearRecord, LinearShape
from qpalette.models.experts import EXPERT
from qpalette.rotate import Rotation, pack_signs, rotate_weight
from qpalette.runtime import Backend, select

logger = logging.getLogger(__name__)

CHUNK_WEIGHTS = 1 << 21  # encoded at a time, in whole tile rows: it bounds the temporaries
GPU_CHUNK_WEIGHTS = 1 << 23  # each chunk has some hundred small launches, and waits for the GPU eight times
BATCH_BYTES = 1 << 28  # of temporaries while calibrated linears are rounded together on a CPU; one may take more
GPU_SHARE = 3  # on a GPU a third of its memory: a step sees a few tiles of each linear, and must fill it


def working_bytes(weights: int, rate: Fraction) -> int:
    """Peak of the temporaries for a linear of so many weights, as measured; a backend's search tables not included."""
    return int(min(weights, CHUNK_WEIGHTS) * (40 + 32 * rate))


def feedback_bytes(linear: LinearShape) -> int:
    """Of calibrated rounding: Hessians and factors of both sides, and weights in float32 and float64."""
    height = row_blocks(linear.out_features)[0].stop
    return 40 * (linear.in_features**2 + linear.weights) + 16 * height * linear.out_features


class Quality(NamedTuple):
    """How far stored weights are from their source W, with the scales as they are stored; 0 for a matrix of zeros."""

    distortion: float  # sum (W - stored)^2 over sum W^2
    proxy: float | None = None  # calibrated, the same of the layer's outputs: tr(E H E^T) over tr(W H W^T)
    faint_rows: int = 0  # of weights so small that their scale has fewer digits in float16, or none


@dataclass(frozen=True)
class EncodedLinear:
    """What is stored of a linear, on the CPU: a tensor for each field of the parts that its record has, such as codes
    int32 [tile rows, tile columns, words], scales int16 [M] and, as diagonal, packed signs uint8 [ceil(K/8)]."""

    codes: torch.Tensor
    scales: torch.Tensor
    diagonal: torch.Tensor
    quality: Quality
    weight_digest: str = ""  # of the weight as it was read


def encode_linear(
    name: str, weight: torch.Tensor, record: LinearRecord, signs: torch.Tensor, device: torch.device
) -> EncodedLinear:
    """Quantize `weight` [M, K] of a floating type with the `signs` [K] of its group.

    Raises CheckpointError naming the tensor when it is not finite or a row scale is beyond float16, and
    UnsupportedError when no backend can encode on `device`.
    """
    backend = select("encode", record.spec, device)
    rotation = Rotation.parse(record.rotation, record.in_features)
    at_a_time = GPU_CHUNK_WEIGHTS if device.type == "cuda" else CHUNK_WEIGHTS
    rows = max(1, at_a_time // (TILE * record.in_features)) * TILE
    codes, scales, error, energy, faint = [], [], 0.0, 0.0, 0
    for chunk in weight.split(rows):
        there = chunk.to(device)
        check_finite(name, there)
        rotated = rotate_weight(there, rotation, signs.to(device))
        part = _encode_rows(name, rotated, record.spec, backend)
        codes.append(part.codes.cpu())
        scales.append(part.scales.cpu())
        error += part.error
        energy += part.energy
        faint += part.faint
    distortion = error / energy if energy else 0.0
    return EncodedLinear(torch.cat(codes), torch.cat(scales), pack_signs(signs), Quality(distortion, None, faint))


@dataclass(frozen=True)
class _Rows:
    codes: torch.Tensor
    scales: torch.Tensor
    error: float
    energy: float
    faint: int


def _encode_rows(name: str, rotated: torch.Tensor, spec: str, backend: Backend) -> _Rows:
    """float64 throughout: no square of a float32 overflows it, and the temporaries are a chunk's."""
    source = rotated.double()
    rms = source.square().mean(dim=1, keepdim=True).sqrt()
    check_scales(name, rms)
    unit = torch.where(rms > 0, source / rms, 0.0)
    tiles = to_tiles(unit.float())
    codes = encode_tiles(backend, spec, tiles.reshape(-1, tiles.shape[-1]))
    decoded = from_tiles(backend.decode(spec, codes).reshape(tiles.shape), *source.shape).double()
    gain = (unit * decoded).sum(1, keepdim=True) / decoded.square().sum(1, keepdim=True)
    scales, faint = round_scales(name, gain * rms)
    return _Rows(
        codes=codes.reshape(*tiles.shape[:2], -1),
        scales=scales.flatten().view(torch.int16),
        error=_total((source - scales.double() * decoded).square()),
        energy=_total(source.square()),
        faint=faint,
    )


def _total(values: torch.Tensor) -> float:
    """Row by row, then exactly: torch's own sum over everything depends on the number of threads."""
    return math.fsum(values.sum(1).tolist())


def encode_tiles(backend: Backend, spec: str, tiles: torch.Tensor) -> torch.Tensor:
    """`backend.encode`, in halves as long as the device has no room; the codes are the same.

    Raises InputError when there is no room for one tile.
    """
    try:
        return backend.encode(spec, tiles)
    except torch.OutOfMemoryError as error:
        if len(tiles) == 1:
            raise InputError(
                f"{tiles.device} has no memory left to encode one tile of {spec}: free some of it, or use --device cpu"
            ) from error
    # Outside the handler, whose traceback would keep the failed call's tensors alive.
    if tiles.device.type == "cuda":
        torch.cuda.empty_cache()
    logger.info("%s is short of memory: %d tiles are encoded in halves", tiles.device, len(tiles))
    return torch.cat([encode_tiles(backend, spec, half) for half in tiles.tensor_split(2)])


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Raises CheckpointError naming the tensor when a weight is NaN or infinite."""
    if not bool(weight.isfinite().all()):
        raise CheckpointError(f"tensor '{name}.weight' holds NaN or infinity; fetch the checkpoint again")


def check_scales(name: str, scales: torch.Tensor) -> None:
    """Raises CheckpointError naming the tensor when a row scale is beyond float16."""
    largest = float(scales.double().abs().max())
    if not largest <= torch.finfo(torch.float16).max:
        raise CheckpointError(
            f"tensor '{name}.weight' has a row of root mean square {largest:g}, beyond float16 (65504): "
            f"leave it out with --exclude '{pattern_of(name)}', or rescale the checkpoint"
        )


def round_scales(name: str, scales: torch.Tensor) -> tuple[torch.Tensor, int]:
    """float16 [M, 1] of float64 [M, 1], and how many have lost digits: those below float16's normal numbers.

    One below its smallest number rounds to 0: the row is lost, and counted so in the distortion. Raises as
    `check_scales`.
    """
    rounded = scales.to(torch.float16)
    check_scales(name, rounded)
    faint = (scales != 0) & (scales.abs() < torch.finfo(torch.float16).smallest_normal)
    return rounded, int(faint.sum())


def tell_of_faint_rows(linear: LinearShape, quality: Quality) -> None:
    """A warning with the way out, where rows are too small for their scales."""
    if quality.faint_rows:
        logger.warning(
            "%s: %d of %d rows are too small for float16 scales (below %.2g), distortion %.3g; leave it out with "
            "--exclude '%s', or rescale the checkpoint",
            *(linear.name, quality.faint_rows, linear.out_features, torch.finfo(torch.float16).smallest_normal),
            *(quality.distortion, pattern_of(linear.name)),
        )


def pattern_of(linear: str) -> str:
    """What leaves a linear out, for --exclude: with an expert all of its layer, which are one module."""
    match = EXPERT.fullmatch(linear)
    return f"{match['experts']}.*" if match else linear
