"""Second moments of what the linears read and of the gradients of what they write, a safetensors file per group.

To second order the loss of an error E in a linear is 1/2 sum over tokens of (g^T E x)^2, x its input and g the gradient
at its output. Its Kronecker form needs two matrices of each linear: H_I = sum of a x x^T and H_O = sum of b g g^T, this
one in blocks of rows where there are many. Linears that read the same x have an H_I each, since their gradients differ:
those of v at an attention sink would drown those of q. The experts of a layer share those of their first linears.
One-sided: one H_I for all that read x, with weights of 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qpalette.core.errors import HessianError
from qpalette.core.files import write_whole
from qpalette.core.records import TILE, LinearGroup, tiles_of
from qpalette.models.experts import EXPERT
from qpalette.rotate import Rotation
from qpalette.storage import StreamingSafetensorsWriter, TensorInfo

VERSION = 2  # of the files; 1 had one tensor, the whole of H_I
SUM = "sum"  # its name
INPUT = "input"
HELD_OUT = "held_out.json"
EXPERT_TOKENS = "expert_tokens.json"
STRIP = 256  # rows: a symmetric matrix is stored as strips, each from its own diagonal on
BLOCK_TILES = 128  # rows of tiles, at most, that share an H_O: 2048 rows


@dataclass(frozen=True)
class Calibration:
    """What Hessians were measured on; those of two calibrations never mix."""

    source: str  # fingerprint of the checkpoint
    text_sha256: str
    tokens: int  # read by the model; an expert sees fewer
    window: int
    sides: int = 1  # 2: output moments as well, and every token weighed by the other side
    seed: int = 0  # of the labels that are drawn for the gradients
    draws: int = 1  # of labels for each token


class HessianStore:
    """A directory of Hessians in the basis of the checkpoint: the rotation is applied when they are used.

    A file appears by a rename after its bytes are on disk, so what is there is whole, and a later run goes on from it.
    """

    def __init__(self, directory: str | Path, calibration: Calibration) -> None:
        self.directory = Path(directory).expanduser()
        self.calibration = calibration

    @classmethod
    def open(cls, directory: str | Path) -> HessianStore:
        """The store that `calibrate` has filled. Raises HessianError when there is none."""
        path = Path(directory).expanduser()
        first = min(path.glob("*.safetensors"), default=None)
        if first is None:
            raise HessianError(f"{path} holds no Hessians; collect them with `qpalette calibrate MODEL {path}`")
        return cls(path, _calibration(first, _metadata(first)))

    @property
    def two_sided(self) -> bool:
        return self.calibration.sides == 2

    def save(
        self,
        group: LinearGroup,
        inputs: torch.Tensor | Mapping[str, torch.Tensor],
        seen: int,
        outputs: Mapping[str, Sequence[torch.Tensor]] | None = None,
    ) -> None:
        """Store H_I [K, K] by the `input_names`, or one for all of them, over the `seen` tokens that reached the group,
        and where there are two sides H_O of each linear by its name, a matrix for each of its `row_blocks`: symmetric,
        floating types, any device.

        Raises HessianError when a matrix is not finite or of another shape, or no token was seen.
        """
        _check_seen(group, seen)
        names = input_names(group, self.two_sided).values()
        matrices = dict(inputs) if isinstance(inputs, Mapping) else dict.fromkeys(names, inputs)
        for linear in group.linears if self.two_sided else ():
            assert outputs is not None
            blocks = zip(_output_names(linear.name, linear.out_features), outputs[linear.name], strict=True)
            matrices |= dict(blocks)
        sizes = self._sizes(group)
        packed = {name: pack_symmetric(matrix.to("cpu", torch.float32)) for name, matrix in matrices.items()}
        for name, matrix in matrices.items():
            _check(group, name, tuple(matrix.shape), (sizes[name], sizes[name]), packed[name])
        self.directory.mkdir(parents=True, exist_ok=True)
        calibration = {key: str(value) for key, value in asdict(self.calibration).items()}
        digests = json.dumps({name: _sha256(tensor) for name, tensor in packed.items()})
        metadata = {"version": str(VERSION), "group": group.name, **calibration, "seen": str(seen), "sha256": digests}
        infos = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()]
        with StreamingSafetensorsWriter(self._file(group.name), infos, metadata) as writer:
            for name, tensor in packed.items():
                writer.write(name, tensor)

    def read(self, group: LinearGroup, linear: str | None = None) -> torch.Tensor:
        """H_I of a `linear` of `group`, or by default the sum of what there is of its linears, float32 [K, K].

        Raises HessianError naming what is wrong with the file.
        """
        names = input_names(group, self.two_sided)
        return sum_of(self._read(group, list(dict.fromkeys(names.values())) if linear is None else [names[linear]]))

    def read_outputs(self, group: LinearGroup, linear: str) -> list[torch.Tensor]:
        """H_O of a linear of `group`, float32, one for each of its `row_blocks`; none of a calibration of one side.

        Raises as `read`.
        """
        if not self.two_sided:
            return []
        rows = next(shape.out_features for shape in group.linears if shape.name == linear)
        return self._read(group, _output_names(linear, rows))

    def identity(self, group: LinearGroup) -> str:
        """Differs where anything that can be read of the group does, from the header alone. Raises HessianError as
        `read` does."""
        return self._header(group)["sha256"]

    def missing(self, groups: Iterable[LinearGroup]) -> list[LinearGroup]:
        """Those still to collect. Raises HessianError when a file is of another model or text."""
        groups = list(groups)
        present = [group for group in groups if self._file(group.name).exists()]
        for group in present:
            self.identity(group)
        return [group for group in groups if group not in present]

    def set_aside(self, windows: Sequence[torch.Tensor]) -> None:
        """Keep windows of tokens that are not calibrated on, int64 [length] each, to measure on later."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self.directory / HELD_OUT, json.dumps([window.tolist() for window in windows]))

    @property
    def held_out(self) -> list[torch.Tensor]:
        """What was set aside. Raises HessianError when nothing was, as in directories of earlier releases."""
        file = self.directory / HELD_OUT
        try:
            return [torch.tensor(window, dtype=torch.int64) for window in json.loads(file.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError) as error:
            raise HessianError(
                f"{file} cannot be read ({error}): run `qpalette calibrate` into another directory"
            ) from error

    def count_experts(self, tokens: Mapping[str, int]) -> None:
        """Keep how many tokens of the text reached experts, by name such as model.layers.1.mlp.experts.3."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self.directory / EXPERT_TOKENS, json.dumps(self.expert_tokens | dict(tokens), sort_keys=True))

    @property
    def expert_tokens(self) -> dict[str, int]:
        """What was counted; none of a model without experts, nor in directories of earlier releases. Raises
        HessianError for a file that is damaged."""
        file = self.directory / EXPERT_TOKENS
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return {str(expert): int(tokens) for expert, tokens in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise _damaged(file, str(error)) from error

    def check_source(self, fingerprint: str) -> None:
        """Raises HessianError unless these Hessians belong to the checkpoint of `fingerprint`."""
        if self.calibration.source != fingerprint:
            raise HessianError(
                f"{self.directory} holds Hessians of another model (fingerprint {self.calibration.source[:12]}, "
                f"this one has {fingerprint[:12]}); run `qpalette calibrate` for this one"
            )

    def _read(self, group: LinearGroup, names: Sequence[str]) -> list[torch.Tensor]:
        metadata, file, sizes = self._header(group), self._file(group.name), self._sizes(group)
        old = "version" not in metadata
        try:
            digests = {INPUT: metadata["sha256"]} if old else json.loads(metadata["sha256"])
            _check_seen(group, int(metadata["seen"]))
            with safe_open(file, "pt") as stored:
                tensors = {name: stored.get_tensor(SUM if old else name) for name in names}
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise _damaged(file, str(error)) from error
        found = []
        for name, tensor in tensors.items():
            size = sizes[name]
            shape = (size, size) if old else (packed_length(size),)
            _check(group, name, tuple(tensor.shape), shape, tensor)
            if _sha256(tensor) != digests.get(name):
                raise _damaged(file, "its SHA-256 differs")
            found.append(tensor if old else unpack_symmetric(tensor, size))
        return found

    def _header(self, group: LinearGroup) -> dict[str, str]:
        file = self._file(group.name)
        if not file.exists():
            raise HessianError(f"{self.directory} has no Hessian of {group.name}; run `qpalette calibrate` again")
        metadata = _metadata(file)
        found = _calibration(file, metadata)
        if found != self.calibration:
            mine, theirs = asdict(self.calibration), asdict(found)
            differing = next(key for key in mine if mine[key] != theirs[key])
            raise HessianError(
                f"{file} was collected with another {differing} ({theirs[differing]}, not {mine[differing]}); "
                "choose another directory"
            )
        if metadata.get("group") != group.name or "sha256" not in metadata:
            raise _damaged(file, f"it is not of {group.name}")
        return metadata

    def _sizes(self, group: LinearGroup) -> dict[str, int]:
        """Name of a stored matrix -> its rows."""
        sizes = dict.fromkeys(input_names(group, self.two_sided).values(), group.in_features)
        for linear in group.linears if self.two_sided else ():
            names = _output_names(linear.name, linear.out_features)
            blocks = row_blocks(linear.out_features)
            sizes |= {name: block.stop - block.start for name, block in zip(names, blocks, strict=True)}
        return sizes

    def _file(self, group: str) -> Path:
        return self.directory / f"{hashlib.sha256(group.encode()).hexdigest()[:40]}.safetensors"


def input_names(group: LinearGroup, two_sided: bool) -> dict[str, str]:
    """Linear -> the name of its H_I. Of one side all have the same; of two each its own, but for experts that share."""
    if not two_sided:
        return {linear.name: INPUT for linear in group.linears}
    matches = {linear.name: EXPERT.fullmatch(linear.name) for linear in group.linears}
    alone = len(group.linears) == 1
    return {
        name: f"{INPUT}.{name}" if expert is None or alone else f"{INPUT}.*.{expert['leaf']}"
        for name, expert in matches.items()
    }


def sum_of(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    total = matrices[0]
    for matrix in matrices[1:]:
        total = total + matrix
    return total


def row_blocks(rows: int) -> list[slice]:
    """The rows that share an H_O: at most 128 rows of tiles, of one height but for the last, which may have less."""
    tiles = tiles_of(rows)
    height = TILE * -(-tiles // -(-tiles // BLOCK_TILES))
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def pack_symmetric(matrix: torch.Tensor) -> torch.Tensor:
    """The upper triangle of [n, n] in strips of 256 rows, each from its diagonal block on: 1-D, a little over half."""
    strips = [matrix[start : start + STRIP, start:].reshape(-1) for start in range(0, len(matrix), STRIP)]
    return torch.cat(strips)


def unpack_symmetric(packed: torch.Tensor, size: int) -> torch.Tensor:
    """[size, size], exactly symmetric, from what `pack_symmetric` kept."""
    matrix, place = packed.new_empty(size, size), 0
    for start in range(0, size, STRIP):
        stop = min(start + STRIP, size)
        strip = packed[place : place + (stop - start) * (size - start)].view(stop - start, size - start)
        corner = strip[:, : stop - start].triu()
        matrix[start:stop, start:stop] = corner + corner.triu(1).T
        matrix[start:stop, stop:] = strip[:, stop - start :]
        matrix[stop:, start:stop] = strip[:, stop - start :].T
        place += strip.numel()
    return matrix


def packed_length(size: int) -> int:
    return sum(min(STRIP, size - start) * (size - start) for start in range(0, size, STRIP))


def rotate_hessian(hessian: torch.Tensor, rotation: Rotation, diagonal: torch.Tensor) -> torch.Tensor:
    """H' = Q S H S Q^T, float64 [K, K], for `hessian` [K, K] and a `diagonal` S [K]: the moments of x' = Q S x.

    float64: one outlier input may outweigh the damping of all others a million times.
    """
    half = rotation.apply(hessian.double() * diagonal)
    return rotation.apply(half.T.contiguous() * diagonal)


def _output_names(linear: str, rows: int) -> list[str]:
    return [f"output.{index}.{linear}" for index in range(len(row_blocks(rows)))]


def _check(
    group: LinearGroup, name: str, shape: tuple[int, ...], expected: tuple[int, ...], values: torch.Tensor
) -> None:
    what = f"the Hessian of {group.name}" if name.startswith(INPUT) else f"the moments {name} of {group.name}"
    if shape != expected or values.dtype != torch.float32:
        raise HessianError(
            f"{what} is {values.dtype} {list(shape)}, not float32 {list(expected)}; "
            "remove it and run `qpalette calibrate` again"
        )
    if not bool(values.isfinite().all()):
        raise HessianError(f"{what} holds NaN or infinity: the model overflows; calibrate in float32")


def _check_seen(group: LinearGroup, seen: int) -> None:
    if seen < 1:
        raise HessianError(
            f"no token of the text reached {group.name}; calibrate on more or other text, or exclude the group"
        )


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as stored:
            return stored.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(file, str(error)) from error


def _calibration(file: Path, metadata: dict[str, str]) -> Calibration:
    try:
        if (version := int(metadata.get("version", "1"))) > VERSION:
            raise HessianError(
                f"{file} is of version {version}, and this release reads up to {VERSION}: upgrade qpalette"
            )
        tokens, window = int(metadata["tokens"]), int(metadata["window"])
        sides, seed = int(metadata.get("sides", "1")), int(metadata.get("seed", "0"))
        draws = int(metadata.get("draws", "1"))
        return Calibration(metadata["source"], metadata["text_sha256"], tokens, window, sides, seed, draws)
    except (KeyError, ValueError) as error:
        raise _damaged(file, f"no {error} in its metadata") from error


def _damaged(file: Path, reason: str) -> HessianError:
    return HessianError(f"{file} is no intact Hessian ({reason}); remove it and run `qpalette calibrate` again")


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
