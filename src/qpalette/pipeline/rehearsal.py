"""The result's modules on the meta device, before anything is encoded: whether it could be loaded, and run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qpalette.core.errors import ArtifactError, CheckpointError, UnsupportedError
from qpalette.core.records import LinearRecord
from qpalette.core.text import first_line
from qpalette.formats import PackedCheckpoint
from qpalette.formats.parts import parts_of
from qpalette.models import find_groups
from qpalette.models.forward import forward_on_meta
from qpalette.models.model_class import build_on_meta, why_not_built
from qpalette.models.names import Names
from qpalette.models.resolver import NO_CLASS, resolve
from qpalette.nn import pack_modules
from qpalette.storage import Checkpoint

WAY_OUT = "leave linears out with --exclude"


def rehearse(source: Checkpoint, result: PackedCheckpoint, records: Mapping[str, LinearRecord]) -> None:
    """Build, name, initialise and run what `quantize` is about to write, without its values.

    Raises CheckpointError saying what would not work.
    """
    model = build_on_meta(source.config)
    if model is None:
        raise CheckpointError(no_class(source.config))
    name = type(model).__name__
    try:
        places = pack_modules(model, records, result.tensors)
        _check_names(model, records, places)
        with torch.no_grad():
            model.initialize_weights()
        if not any(parameter.is_floating_point() for parameter in model.parameters()):
            raise ArtifactError("transformers tells a model's type by its first parameter, and none would be left")
    except (ArtifactError, UnsupportedError, AttributeError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{name} could not load the result ({first_line(error)}): leave linears out with --exclude"
        ) from error
    failure = forward_on_meta(model).failure
    if failure is not None and resolve(source).seen.failure is None:
        reason = f"{name} could not run the result ({first_line(failure)})"
        raise CheckpointError(f"{reason}: leave linears out with --exclude") from failure


def check_packable(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError with the reason where there is nothing to quantize."""
    grouping = find_groups(checkpoint)
    if grouping.all_groups:
        return
    reasons = set(grouping.reasons.values())
    if reasons == {NO_CLASS}:
        raise CheckpointError(no_class(checkpoint.config))
    raise CheckpointError(f"no linear of this model can be packed: {', '.join(sorted(reasons)) or 'it has no matrix'}")


def no_class(config: Mapping[str, Any]) -> str:
    """The error of a model that nothing here could load."""
    import transformers

    return (
        f"transformers {transformers.__version__} has no class for the model type '{config.get('model_type')}' that it "
        f"can build from config.json ({why_not_built(config)}), and code of the model's own repository is never run: "
        "nothing here could load the result. Update transformers, or check the config"
    )


def _check_names(model: Any, records: Mapping[str, LinearRecord], places: Mapping[str, str]) -> None:
    """Every packed tensor goes where its module is."""
    names = Names(model)
    for linear, module in places.items():
        for part in parts_of(records[linear]):
            found = names.renamed(f"{linear}.{part.suffix}")[0]
            if found != f"{module}.{part.suffix}":
                raise ArtifactError(f"transformers takes '{linear}.{part.suffix}' for '{found}'")
