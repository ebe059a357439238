"""Whether a checkpoint has all that its model class needs, as transformers says it: nothing is left to chance."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qpalette.core.errors import CheckpointError, QPaletteError
from qpalette.core.text import first_line
from qpalette.models.experts import EXPERT
from qpalette.models.model_class import build_on_meta
from qpalette.models.names import Names
from qpalette.storage.base import Checkpoint, TensorInfo

logger = logging.getLogger(__name__)

SHOWN = 3  # names in an error
Refusal = type[QPaletteError]


def check_complete(checkpoint: Checkpoint) -> None:
    """From headers alone: transformers loads tensors without content into the checkpoint's class.

    Raises CheckpointError naming tensors that are missing, of another shape than the class has, or of a type that is no
    number where it has one. Without a class in transformers nobody knows what is needed, and nothing is checked.
    """
    model = build_on_meta(checkpoint.config)
    if model is None:
        logger.warning("%s: transformers has no class that tells whether a tensor is missing", checkpoint.location)
        return
    where = checkpoint.location
    _check_experts(where, checkpoint.tensors, model)
    _check_types(where, checkpoint.tensors, dict(model.named_parameters()))
    check_loaded(where, _loading_info(model, checkpoint))


def check_loaded(where: object, info: Mapping[str, Any], error: Refusal = CheckpointError) -> None:
    """Raises `error` when `from_pretrained` had no weights for something, by its `output_loading_info`: it fills that
    with random numbers."""
    if missing := sorted(info["missing_keys"]):
        raise error(
            f"{where} has no tensor for {some(missing)} of its model class, which would be random numbers; fetch it "
            "again, or repeat what made it (a merge, a conversion)"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise error(
            f"{where}: tensor {name!r} has shape {tuple(stored)}, but config.json asks for {tuple(wanted)} "
            f"({len(mismatched)} do not fit); give the config.json that belongs to it"
        )


def check_finite(where: object, model: nn.Module, error: Refusal = CheckpointError) -> None:
    """Raises `error` naming a parameter of a loaded model that is NaN or infinite: all answers would come from
    it."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point() or not parameter.numel():
            continue
        if not torch.stack(parameter.aminmax()).isfinite().all():
            reason = ", perhaps as it is beyond float16: choose another dtype" * (parameter.dtype == torch.float16)
            raise error(f"{where}: parameter {name!r} holds NaN or infinity{reason}; fetch the file again")


def some(names: list[str]) -> str:
    """The first of many."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _check_experts(where: object, names: Iterable[str], model: Any) -> None:
    """transformers stacks the experts that it finds: where one is missing it says that a conversion failed."""
    parameters = model.state_dict()
    for unit in Names(model).units(names):
        for tensors in unit.tensors if unit.of_experts else ():
            match = EXPERT.match(tensors[0]) if tensors else None
            if match is None:
                continue
            all_experts = range(parameters[unit.parameters[0]].shape[0])
            wanted = [f"{match['experts']}.{index}.{match['leaf']}.weight" for index in all_experts]
            if missing := [name for name in wanted if name not in tensors]:
                raise CheckpointError(f"{where} has no tensor {some(missing)}, as other experts have; fetch it again")


def _check_types(where: object, tensors: Mapping[str, TensorInfo], parameters: Mapping[str, torch.Tensor]) -> None:
    for name, info in tensors.items():
        parameter = parameters.get(name)
        if parameter is not None and parameter.is_floating_point() and not info.dtype.is_floating_point:
            raise CheckpointError(
                f"{where}: tensor {name!r} is {info.dtype}, where the model class has a float: what its numbers mean "
                "is not known; give the 16-bit original"
            )


def _loading_info(model: Any, checkpoint: Checkpoint) -> Mapping[str, Any]:
    tensors = {
        info.name: torch.empty(info.shape, dtype=info.dtype, device="meta") for info in checkpoint.tensors.values()
    }
    try:
        with _quiet():
            _, info = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=tensors,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.location}: its tensors cannot be loaded into {type(model).__name__} "
            f"({type(error).__name__}: {first_line(error)}); check that config.json belongs to it"
        ) from error
    return info


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report and progress bar: what they would say is raised."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
