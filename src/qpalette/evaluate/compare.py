"""Several models against one original on one text: what each takes on disk, and what that costs."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qpalette.core.cache import limit_bytes, mark_used, private_folder
from qpalette.core.errors import InputError, QPaletteError
from qpalette.core.text import first_line
from qpalette.evaluate.kept import KeptPredictions
from qpalette.evaluate.loading import is_artifact, load_model, load_tokenizer, plan_of, predicted_kl
from qpalette.evaluate.metrics import Evaluation, Progress, evaluate_models
from qpalette.evaluate.text_source import check_text, model_windows
from qpalette.evaluate.windows import WINDOW, check_limit
from qpalette.formats import DequantizedCheckpoint, open_artifact
from qpalette.formats.parts import total_bits
from qpalette.runtime.device import parse_device
from qpalette.storage import Checkpoint, local_path, open_checkpoint
from qpalette.theory.allocation import reverse_water_filling

logger = logging.getLogger(__name__)

AS_STORED = ("qpalette", "safetensors")  # formats that a model runs in; of the others it is a decoded copy


@dataclass(frozen=True)
class Compared:
    """A model beside the original; what is not known is None, as are figures against itself of the original."""

    model: str
    format: str | None = None  # "qpalette", or a `Checkpoint`'s
    file_bytes: int | None = None  # of its weight files
    bits_per_weight: float | None = None  # those bytes over the weights of the original: nothing is left out
    kl: float | None = None  # the rest as in `Evaluation`
    kl_stderr: float | None = None
    kl_median: float | None = None
    kl_999: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    kl_bound: float | None = None  # least KL for as many bits, by the sensitivities that its plan was made with
    tokens_per_second: float | None = None  # whoever calls `compare` times it
    failure: str | None = None  # one line


def compare(
    original: str | Path,
    models: Sequence[str | Path],
    text: str | Path,
    windows: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    found: Callable[[Sequence[Compared]], None] = lambda rows: None,
) -> list[Compared]:
    """The original, then each of `models`: anything that `load_model` opens, one in memory at a time.

    The original reads the windows once (`KeptPredictions`); only its output head stays. `text`, `windows`, `device` and
    `dtype` are those of `evaluate`; `progress` is called with (windows done, windows of all models), `found` with the
    rows so far after each model. A model that fails has its reason in `failure`, and so has one that has another
    tokenizer or vocabulary.

    Raises InputError for a text, device or number of windows that cannot be used, and what loading the original raises.
    """
    check_limit(windows)
    check_text(text, original)
    where, weights = parse_device(device), _weights(_stored(original))
    model, tokenizer = load_model(original, where, dtype)
    chosen = model_windows(text, model, tokenizer, WINDOW, windows)
    said = [] if tokenizer is None else [tokenizer.decode(window) for window in chosen]
    total = len(chosen) * (1 + len(models))
    with TemporaryDirectory(prefix=".", dir=private_folder("compared")) as folder:
        mark_used(Path(folder), limit_bytes())  # removes what killed runs have left
        kept = KeptPredictions(model, Path(folder))
        del model
        rows = [_row(original, weights, evaluate_models(kept, None, chosen, _part(progress, 0, total)))]
        kept.release()
        found(rows)
        for name in models:
            told = _part(progress, len(rows) * len(chosen), total)
            _collect()
            try:
                _check_tokenizer(load_tokenizer(name), tokenizer, said)
                mine, _ = load_model(name, where, dtype)
                rows.append(_row(name, weights, evaluate_models(mine, kept, chosen, told)))
            except Exception as error:  # whatever a model's code raises: the others have taken hours
                logger.debug("%s", name, exc_info=error)
                rows.append(Compared(str(name), failure=reason(error)))
                told(len(chosen), len(chosen))
            mine = None
            found(rows)
    return rows


def reason(error: Exception) -> str:
    """One line: a message of ours as it is, another with its kind."""
    line = first_line(error)
    return line if isinstance(error, QPaletteError) else f"{type(error).__name__}: {line}"


def _row(name: str | Path, weights: int, found: Evaluation) -> Compared:
    checkpoint = _stored(name)
    nbytes = sum(file.stat().st_size for file in checkpoint.files)
    return Compared(
        str(name),
        "qpalette" if isinstance(checkpoint, DequantizedCheckpoint) else checkpoint.format,
        nbytes,
        8 * nbytes / weights,
        found.kl,
        found.kl_stderr,
        found.kl_median,
        found.kl_999,
        found.top1,
        found.perplexity,
        _bound(name),
    )


def _bound(name: str | Path) -> float | None:
    """By reverse water-filling; None where no plan predicts a KL."""
    place = local_path(name)
    plan = plan_of(place)
    if plan is None or predicted_kl(place) is None:
        return None
    records = [open_artifact(place).records[linear] for linear in plan.specs]
    bits = total_bits(records).total
    return reverse_water_filling(
        [plan.sensitivities[linear] for linear in plan.specs], [record.weights for record in records], bits
    ).predicted_loss


def _stored(model: str | Path) -> Checkpoint:
    """Its files, and its tensors as plain ones, from headers."""
    place = local_path(model)
    return DequantizedCheckpoint(open_artifact(place), torch.float16) if is_artifact(place) else open_checkpoint(place)


def _weights(checkpoint: Checkpoint) -> int:
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values() if info.dtype.is_floating_point)


def _check_tokenizer(mine: Any, true: Any, said: Sequence[str]) -> None:
    """Raises InputError where the text means other tokens; a model without a tokenizer takes the original's."""
    if mine is None or true is None:
        return
    for text in said:
        ours, theirs = (known(text, add_special_tokens=False, verbose=False)["input_ids"] for known in (mine, true))
        if ours != theirs:
            at = next(
                i for i, pair in enumerate(zip([*ours, None], [*theirs, None], strict=False)) if len(set(pair)) > 1
            )
            raise InputError(
                f"its tokenizer is not the original's: token {at} of a window is {_token(mine, ours, at)}, where the "
                f"original has {_token(true, theirs, at)}; compare models that were made from this original"
            )


def _token(tokenizer: Any, tokens: Sequence[int], at: int) -> str:
    return f"{tokens[at]} ({tokenizer.convert_ids_to_tokens(tokens[at])!r})" if at < len(tokens) else "no more"


def _part(progress: Progress | None, before: int, total: int) -> Progress:
    """Of all windows, where one model counts its own."""
    return lambda done, _: None if progress is None else progress(before + done, total)


def _collect() -> None:
    """The memory of the model before is free for the next."""
    gc.collect()
    torch.cuda.empty_cache()
