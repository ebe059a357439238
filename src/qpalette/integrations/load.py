"""A quantized model and its tokenizer, ready to generate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qpalette.core.errors import UnsupportedError
from qpalette.formats.reader import open_artifact
from qpalette.runtime import backends
from qpalette.runtime.dispatch import ENVIRONMENT


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | torch.device | int | None = None,
    backend: str | None = None,
) -> tuple[Any, Any]:
    """The model, a `PreTrainedModel` in evaluation mode, and the tokenizer of a directory or a Hub name.

    dtype: of the activations and of what is not quantized; the checkpoint's own by default. device_map: as in
    `from_pretrained`; the CPU by default. backend: the only one that may run, by name; like the variable
    QPALETTE_BACKEND, which it sets, it holds for the whole process.

    Raises ArtifactError when the directory is no intact quantized model, and UnsupportedError with the reasons when no
    backend can run it.
    """
    if backend is not None:
        if backend not in backends():
            raise UnsupportedError(f"there is no backend '{backend}': known are {', '.join(backends())}")
        os.environ[ENVIRONMENT] = backend
    if Path(path).is_dir():
        open_artifact(path)
    options = {"dtype": dtype, "device_map": device_map}
    given = {name: value for name, value in options.items() if value is not None}
    model = AutoModelForCausalLM.from_pretrained(str(path), **given)
    return model, AutoTokenizer.from_pretrained(str(path))
