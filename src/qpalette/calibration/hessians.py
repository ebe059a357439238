"""Second moments of the linears' inputs, H = sum of x x^T, one safetensors file per group of linears."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qpalette.core.errors import HessianError
from qpalette.core.records import LinearGroup
from qpalette.rotate import Rotation
from qpalette.storage import StreamingSafetensorsWriter, TensorInfo

SUM = "sum"


@dataclass(frozen=True)
class Calibration:
    """What Hessians were measured on; those of two calibrations never mix."""

    source: str  # fingerprint of the checkpoint
    text_sha256: str
    tokens: int  # read by the model; an expert sees fewer
    window: int


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

    def save(self, group: LinearGroup, hessian: torch.Tensor, seen: int) -> None:
        """Store the sum of x x^T over the `seen` tokens that reached the group: [K, K], a floating type, any device.

        Raises HessianError when it is not finite or no token was seen.
        """
        stored = hessian.to("cpu", torch.float32).contiguous()
        _check(group, stored, seen)
        self.directory.mkdir(parents=True, exist_ok=True)
        calibration = {key: str(value) for key, value in asdict(self.calibration).items()}
        metadata = {"group": group.name, **calibration, "seen": str(seen), "sha256": _sha256(stored)}
        info = TensorInfo(SUM, tuple(stored.shape), stored.dtype)
        with StreamingSafetensorsWriter(self._file(group.name), [info], metadata) as writer:
            writer.write(SUM, stored)

    def read(self, group: LinearGroup) -> torch.Tensor:
        """The sum of x x^T over all tokens, float32 [K, K]. Raises HessianError naming what is wrong with the file."""
        identity, file = self.identity(group), self._file(group.name)
        try:
            with safe_open(file, "pt") as stored:
                hessian, seen = stored.get_tensor(SUM), int(stored.metadata()["seen"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise _damaged(file, str(error)) from error
        _check(group, hessian, seen)
        if _sha256(hessian) != identity:
            raise _damaged(file, "its SHA-256 differs")
        return hessian

    def identity(self, group: LinearGroup) -> str:
        """The SHA-256 of what `read` returns, from the header alone. Raises HessianError as `read` does."""
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
        return metadata["sha256"]

    def missing(self, groups: Iterable[LinearGroup]) -> list[LinearGroup]:
        """Those still to collect. Raises HessianError when a file is of another model or text."""
        groups = list(groups)
        present = [group for group in groups if self._file(group.name).exists()]
        for group in present:
            self.identity(group)
        return [group for group in groups if group not in present]

    def check_source(self, fingerprint: str) -> None:
        """Raises HessianError unless these Hessians belong to the checkpoint of `fingerprint`."""
        if self.calibration.source != fingerprint:
            raise HessianError(
                f"{self.directory} holds Hessians of another model (fingerprint {self.calibration.source[:12]}, "
                f"this one has {fingerprint[:12]}); run `qpalette calibrate` for this one"
            )

    def _file(self, group: str) -> Path:
        return self.directory / f"{hashlib.sha256(group.encode()).hexdigest()[:40]}.safetensors"


def rotate_hessian(hessian: torch.Tensor, rotation: Rotation, signs: torch.Tensor) -> torch.Tensor:
    """H' = Q S H S Q^T, float64 [K, K], for `hessian` [K, K] and `signs` [K] of +-1: the moments of x' = Q S x.

    float64: one outlier input may outweigh the damping of all others a million times.
    """
    half = rotation.apply(hessian.double() * signs)
    return rotation.apply(half.T.contiguous() * signs)


def _check(group: LinearGroup, hessian: torch.Tensor, seen: int) -> None:
    size = group.in_features
    if tuple(hessian.shape) != (size, size) or hessian.dtype != torch.float32:
        raise HessianError(
            f"the Hessian of {group.name} is {hessian.dtype} {tuple(hessian.shape)}, not float32 [{size}, {size}]; "
            "remove it and run `qpalette calibrate` again"
        )
    if seen < 1:
        raise HessianError(
            f"no token of the text reached {group.name}; calibrate on more or other text, or exclude the group"
        )
    if not bool(hessian.isfinite().all()):
        raise HessianError(
            f"the Hessian of {group.name} holds NaN or infinity: its inputs overflow; calibrate in float32"
        )


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as stored:
            return stored.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(file, str(error)) from error


def _calibration(file: Path, metadata: dict[str, str]) -> Calibration:
    try:
        return Calibration(
            metadata["source"], metadata["text_sha256"], int(metadata["tokens"]), int(metadata["window"])
        )
    except (KeyError, ValueError) as error:
        raise _damaged(file, f"no {error} in its metadata") from error


def _damaged(file: Path, reason: str) -> HessianError:
    return HessianError(f"{file} is no intact Hessian ({reason}); remove it and run `qpalette calibrate` again")


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
