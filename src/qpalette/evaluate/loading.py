"""Any model that qpalette knows as a transformers model: a quantized directory, a checkpoint, a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qpalette.core.errors import ArtifactError, CheckpointError, SpecError
from qpalette.formats.reader import open_artifact
from qpalette.models import find_groups, weight_bytes
from qpalette.plan import PLAN_FILE, Plan
from qpalette.storage import open_checkpoint, plain_directory


def load_model(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The causal language model at `path` in evaluation mode on `device`, and its tokenizer.

    `path` is a quantized directory, a Hugging Face directory, a .gguf file or a Hub id. A GGUF file is dequantized
    once, into a cache. Weights that are not quantized, and activations, have `dtype`. No code of the model runs.

    Raises ArtifactError or CheckpointError when there is no such model or transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = is_artifact(path)
    directory = Path(path).expanduser() if quantized else plain_directory(open_checkpoint(path))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return model.to(device).eval(), tokenizer
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError) as error:
        kind = ArtifactError if quantized else CheckpointError
        reason = str(error).strip().partition("\n")[0]
        raise kind(f"transformers cannot load {path} ({type(error).__name__}: {reason})") from error


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

    None for a GGUF file, whose headers are read as the dequantized model's, and for a model without linears.
    """
    if is_artifact(path):
        return float(open_artifact(Path(path).expanduser()).bits().rate)
    checkpoint = open_checkpoint(path)
    linears = [linear for group in find_groups(checkpoint).groups for linear in group.linears]
    if checkpoint.format == "gguf" or not linears:
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
