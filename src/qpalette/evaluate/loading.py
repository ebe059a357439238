"""Any model that qpalette knows as a transformers model: a quantized directory, a checkpoint, a GGUF file."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from qpalette.core.errors import ArtifactError, CheckpointError, QPaletteError, SpecError, UnsupportedError
from qpalette.core.text import first_line
from qpalette.formats.reader import open_artifact
from qpalette.models import check_finite, check_loaded, find_groups, weight_bytes
from qpalette.models.model_class import class_of, config_for, too_many
from qpalette.models.vocabulary import has_tokenizer
from qpalette.plan import PLAN_FILE, Plan
from qpalette.runtime import backends
from qpalette.runtime.device import parse_device
from qpalette.runtime.dispatch import ENVIRONMENT
from qpalette.storage import local_path, open_checkpoint, plain_directory

logger = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | torch.device | int | None = None,
    backend: str | None = None,
    quantization_config: Any = None,
) -> tuple[Any, Any]:
    """As `qpalette.load`, whose arguments these are, with the `generate` of transformers; `quantization_config` is a
    `qpalette.Config` for a model that is not quantized."""
    where = parse_device(device)
    if backend is not None:
        if backend not in backends():
            raise UnsupportedError(f"there is no backend '{backend}': known are {', '.join(backends())}")
        os.environ[ENVIRONMENT] = backend
    place = local_path(path)
    quantized = is_artifact(place)
    directory = directory_for(place)
    # To a GPU each tensor goes by itself: packed ones would be laid out for the processor first, and then again.
    spread = {"": where} if device_map is None and where.type == "cuda" else device_map
    options = {"dtype": dtype, "device_map": spread, "quantization_config": quantization_config}
    kind = ArtifactError if quantized else CheckpointError
    given = {name: value for name, value in options.items() if value is not None}
    try:
        model, tokenizer = _read(directory, given, kind)
        return (model if spread is not None else model.to(where)).eval(), tokenizer
    except QPaletteError:
        raise
    except Exception as error:  # whatever transformers raises on a config or a tokenizer of nonsense
        raise kind(f"transformers cannot load {path} ({type(error).__name__}: {first_line(error)})") from error


def directory_for(path: str | Path) -> Path:
    """What transformers and the engines open: a quantized directory, checked; a checkpoint's own; a plain copy of a
    GGUF file and of what another tool has quantized. Raises ArtifactError or CheckpointError."""
    place = local_path(path)
    return open_artifact(place).directory if is_artifact(place) else plain_directory(open_checkpoint(place))


def load_tokenizer(path: str | Path) -> Any:
    """As `load`'s, without the model. Raises as that does."""
    directory = directory_for(path)
    try:
        return _tokenizer(directory)
    except Exception as error:  # as above
        raise CheckpointError(f"transformers cannot load the tokenizer of {path} ({first_line(error)})") from error


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """`load` as measurements take it: on one device, in float32 unless they ask for less."""
    return load(path, device=device, dtype=dtype)


def _read(directory: Path, options: dict[str, Any], kind: type[QPaletteError]) -> tuple[Any, Any]:
    return read_model(directory, options, kind), _tokenizer(directory)


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    if not has_tokenizer(directory):
        logger.warning("%s has no tokenizer: None stands for it", directory)
        return None
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


def read_model(directory: Path, options: dict[str, Any], kind: type[QPaletteError] = CheckpointError) -> Any:
    """The model alone, of the class that its config names: of text, of images and text, of sequences to sequences.

    Raises `kind` when a weight is missing, of another shape, or not finite.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    if reason := too_many(json.loads((directory / "config.json").read_text(encoding="utf-8"))):
        raise ValueError(reason)
    found = class_of(config)
    if found is None:
        raise ValueError(f"no class of it generates text from a config of type '{config.model_type}'")
    loaded: Any = found.from_pretrained(
        directory, config=config_for(found, config), local_files_only=True, output_loading_info=True, **options
    )
    model, info = loaded
    check_loaded(directory, info, kind)
    check_finite(directory, model, kind)
    return model


def is_artifact(path: str | Path) -> bool:
    """Whether `path` is a directory whose config.json says that qpalette quantized it."""
    config = Path(path).expanduser() / "config.json"
    try:
        method = json.loads(config.read_text(encoding="utf-8"))["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # whatever it is, opening it as a checkpoint says what is wrong
    return method == "qpalette"


def bits_per_weight(path: str | Path) -> float | None:
    """Stored bits per weight of the linears, everything counted, from headers alone.

    None for a GGUF file or another tool's quantized model, whose headers are read as the dequantized model's, and for a
    model without linears.
    """
    if is_artifact(path):
        return float(open_artifact(Path(path).expanduser()).bits().rate)
    checkpoint = open_checkpoint(path)
    linears = [linear for group in find_groups(checkpoint).groups for linear in group.linears]
    if checkpoint.format != "safetensors" or not linears:
        return None
    stored = sum(weight_bytes(checkpoint, linear) for linear in linears)
    return 8 * stored / sum(linear.weights for linear in linears)


def plan_of(path: str | Path) -> Plan | None:
    """The plan that a quantized directory was made by; None where there is none that can be read."""
    try:
        return Plan.read(Path(path).expanduser() / PLAN_FILE)
    except SpecError:
        return None


def predicted_kl(path: str | Path) -> float | None:
    """KL from the original in nats per token, as the plan of a quantized directory predicts it; None when it has no
    sensitivities of that kind."""
    plan = plan_of(path)
    if plan is None or "method" not in plan.provenance.get("sensitivities", {}):
        return None
    return plan.predicted_loss
