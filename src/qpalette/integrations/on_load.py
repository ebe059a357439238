"""Quantize while loading: what `from_pretrained(MODEL, quantization_config=qpalette.Config(bits=4))` does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from qpalette.codes import parse_spec
from qpalette.core.errors import CheckpointError, InputError, SpecError
from qpalette.core.rate import parse_rate
from qpalette.formats import METHOD, open_artifact
from qpalette.pipeline.cached import quantized_copy
from qpalette.plan import parse_size
from qpalette.storage import Checkpoint, open_checkpoint


class Config(QuantizationConfigMixin):
    """For `from_pretrained`, how to quantize a model that is not quantized; no data is needed.

    Arguments are those of `qpalette.quantize`, of which `bits`, `size` or `spec` says how far. `device` is where to
    encode: by default the GPU that the model goes to, or any that is here. The result is kept under $QPALETTE_CACHE:
    the same model with the same arguments loads as a quantized directory does, and may be saved as one.

    Raises SpecError on arguments that mean nothing.
    """

    def __init__(
        self,
        bits: str | float | Fraction | None = None,
        *,
        spec: str | None = None,
        size: str | int | None = None,
        effort: str | None = None,
        prefer: str = "balanced",
        target: str | None = None,
        rotation: str = "full",
        seed: int = 0,
        also: Sequence[str] = (),
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        device: str | None = None,
    ) -> None:
        if (bits is None and size is None) == (spec is None):
            raise SpecError("give one of bits (such as 3.25) or size (6GB), and a spec (tcq-3.25)")
        if bits is not None and not isinstance(bits, Fraction):
            bits = parse_rate(str(bits))
        self.quant_method = METHOD  # type: ignore[assignment]  # theirs has an enumeration of their own methods
        self.bits = None if bits is None else format(float(bits), ".12g")
        self.spec = None if spec is None else parse_spec(spec).name
        self.size = None if size is None else parse_size(str(size))
        self.effort, self.prefer, self.target, self.rotation, self.seed = effort, prefer, target, rotation, seed
        self.also, self.include, self.exclude = list(also), list(include), list(exclude)
        self.device = device

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `quantize`, `device` not among them."""
        return {name: value for name, value in vars(self).items() if name not in ("quant_method", "device")}


def quantize_first(config: Config, files: list[str] | None, device_map: Any) -> dict[str, Any]:
    """Quantize the checkpoint whose `files` transformers is about to load by `device_map`; they become those of the
    result, in place, since transformers hands on nothing else. Returns the result's quantization_config.

    Raises InputError when there are no files or some of the model is to stay on the disk, CheckpointError when the
    files are not what qpalette reads, and as `quantize`.
    """
    if not files:
        raise InputError("quantizing while loading needs a checkpoint on disk: give its directory or its Hub id")
    if isinstance(device_map, Mapping) and "disk" in device_map.values():
        raise InputError("what is quantized while loading cannot stay on the disk: run `qpalette quantize`, load that")
    checkpoint = open_checkpoint(Path(files[0]).parent)
    asked = {Path(file).resolve() for file in files}
    if asked != {file.resolve() for file in checkpoint.files}:
        read = ", ".join(file.name for file in checkpoint.files)
        raise CheckpointError(
            f"transformers would load {', '.join(sorted(file.name for file in asked))} and qpalette reads {read}: give "
            "a directory of the one model (no variant), or quantize it with `qpalette quantize`"
        )
    artifact = open_artifact(quantized(checkpoint, config, devices_of(device_map)))
    files[:] = sorted({str(stored.file) for stored in artifact.stored.values()})
    return artifact.config["quantization_config"]


def quantized(checkpoint: Checkpoint, config: Config, devices: Collection[torch.device] = ()) -> Path:
    """The copy of `checkpoint` in the cache that is quantized for `devices`, made first where it is not there. Raises
    as `quantized_copy`."""
    with _Bar() as bar:
        return quantized_copy(checkpoint, device=config.device or _encoder(devices), progress=bar, **config.options)


def devices_of(device_map: Any) -> set[torch.device]:
    """The devices that compute. Of "auto" and the like nothing is known yet: transformers asks again when it is."""
    if isinstance(device_map, str):
        return set()
    places = device_map.values() if isinstance(device_map, Mapping) else ["cpu" if device_map is None else device_map]
    return {torch.device(place) for place in places if place not in ("disk", "meta")}


def _encoder(devices: Collection[torch.device]) -> str:
    graphics = sorted(str(device) for device in devices if device.type == "cuda")
    return graphics[0] if graphics else "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def ordinary_surroundings(tie_weights: Callable[..., Any]) -> Iterator[None]:
    """For work in the midst of what transformers builds: tensors would be on the meta device, in the model's type, and
    no model would tie its weights. `tie_weights` is the method of PreTrainedModel from before that."""
    from transformers import PreTrainedModel

    before, replaced = torch.get_default_dtype(), PreTrainedModel.tie_weights
    torch.set_default_dtype(torch.float32)
    setattr(PreTrainedModel, "tie_weights", tie_weights)  # noqa: B010 - a method
    try:
        with torch.device("cpu"):
            yield
    finally:
        setattr(PreTrainedModel, "tie_weights", replaced)  # noqa: B010
        torch.set_default_dtype(before)


class _Bar:
    """The pipeline's progress on a bar of transformers, which appears with the first linear."""

    def __enter__(self) -> _Bar:
        self._bar: Any = None
        self._done = 0  # what transformers gives where its bars are switched off counts nothing
        return self

    def __call__(self, done_weights: int, total_weights: int, linear: str, distortion: float) -> None:
        if self._bar is None:
            self._bar = logging.tqdm(total=total_weights, desc="Quantizing", unit=" weights", unit_scale=True)
        self._bar.update(done_weights - self._done)
        self._done = done_weights

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
