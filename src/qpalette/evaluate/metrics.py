"""How close a model stays to its original: perplexity, KL divergence, agreement on the most likely token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qpalette.core.errors import InputError
from qpalette.models.vocabulary import check_tokens

CHUNK = 256  # positions whose log-probabilities are held in float32 at a time: 250 MB at a vocabulary of 256k

Progress = Callable[[int, int], None]  # (windows done, windows in all)
CacheFactory = Callable[[Any], Any]  # model -> an empty transformers Cache for one window


@dataclass(frozen=True)
class Evaluation:
    """Means over all predictions; what compares with a reference is None without one."""

    perplexity: float
    reference_perplexity: float | None
    kl: float | None  # KL(reference || model) per token, in nats
    kl_stderr: float | None  # of `kl`, from the spread between windows; None below two windows
    top1: float | None  # share of predictions whose most likely token is the reference's
    windows: int
    tokens: int  # predictions: one less than tokens in each window
    bits_per_weight: float | None = None  # of the quantized linears, everything stored counted; None if unknown
    predicted_kl: float | None = None  # by the plan of the quantized model; None if it has none
    kl_median: float | None = None  # of single predictions
    kl_999: float | None = None  # 99.9 % of predictions have no more


@dataclass
class _Sums:
    """Running sums in float64 over all positions, and the mean KL of each window."""

    tokens: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    agreements: int = 0
    window_kl: list[tuple[float, int]] = field(default_factory=list)  # (sum over the window, predictions)
    token_kl: list[torch.Tensor] = field(default_factory=list)  # of single predictions, float32 on the CPU


def evaluate_models(
    model: Any,
    reference: Any | None,
    windows: Sequence[torch.Tensor],
    progress: Progress | None = None,
    cache: CacheFactory | None = None,
) -> Evaluation:
    """Run both causal language models over `windows` (int64 [length >= 2] each) and compare their predictions.

    `model` and `reference` are transformers models in evaluation mode, on any devices; with `reference` None only the
    perplexity is measured. Logits are compared in float32, `CHUNK` positions at a time; sums are kept in float64.

    Both run through a key-value cache, as they do when they generate: attention reads what the cache's `update` gives
    back, so that what a cache loses is measured with the rest. A model makes its own; `cache` makes that of `model`
    instead, one for each window; where that has a `feed`, so many tokens go through the model at a time.

    Raises InputError when there is no window, a token lies outside the vocabulary, or the vocabularies differ.
    """
    if not windows:
        raise InputError("there are no windows to evaluate on")
    sums = _Sums()
    for done, window in enumerate(windows, start=1):
        _add_window(sums, model, reference, window, cache)
        if progress is not None:
            progress(done, len(windows))
    return _summary(sums, reference is not None, len(windows))


def _add_window(
    sums: _Sums, model: Any, reference: Any | None, window: torch.Tensor, cache: CacheFactory | None
) -> None:
    logits = _logits(model, window, cache)
    other = None if reference is None else _logits(reference, window)
    if other is not None and other.shape != logits.shape:
        raise InputError(
            f"the models have vocabularies of {logits.shape[-1]} and {other.shape[-1]} tokens; "
            "give the reference that this model was made from"
        )
    targets = window[1:].to(logits.device)
    divergence = 0.0
    for start in range(0, len(targets), CHUNK):
        rows = slice(start, start + CHUNK)
        mine = logits[rows].float().log_softmax(-1)
        sums.loss -= _total(_at(mine, targets[rows]))
        if other is not None:
            true = other[rows].to(logits.device).float().log_softmax(-1)
            sums.reference_loss -= _total(_at(true, targets[rows]))
            sums.agreements += int((mine.argmax(-1) == true.argmax(-1)).sum())
            each = (true.exp() * (true - mine)).sum(-1)
            divergence += _total(each)
            sums.token_kl.append(each.cpu())
    sums.tokens += len(targets)
    sums.window_kl.append((divergence, len(targets)))


@torch.inference_mode()
def _logits(model: Any, window: torch.Tensor, cache: CacheFactory | None = None) -> torch.Tensor:
    """[length - 1, vocabulary]: the prediction of each token but the first."""
    check_tokens(window.tolist(), model)
    own = None if cache is None else cache(model)
    feed = getattr(own, "feed", None) or len(window)
    parts = window.to(model.device)[None].split(feed, 1)
    logits = [model(part, past_key_values=own, use_cache=True).logits[0] for part in parts]
    return torch.cat(logits)[:-1] if len(logits) > 1 else logits[0][:-1]


def _at(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return log_probabilities.gather(1, targets[:, None])[:, 0]


def _total(values: torch.Tensor) -> float:
    return float(values.double().sum())


def _summary(sums: _Sums, compared: bool, windows: int) -> Evaluation:
    kl = math.fsum(total for total, _ in sums.window_kl) / sums.tokens
    return Evaluation(
        perplexity=_perplexity(sums.loss / sums.tokens),
        reference_perplexity=_perplexity(sums.reference_loss / sums.tokens) if compared else None,
        kl=kl if compared else None,
        kl_stderr=_standard_error([total / count for total, count in sums.window_kl]) if compared else None,
        top1=sums.agreements / sums.tokens if compared else None,
        windows=windows,
        tokens=sums.tokens,
        kl_median=_quantile(sums.token_kl, 0.5) if compared else None,
        kl_999=_quantile(sums.token_kl, 0.999) if compared else None,
    )


def _quantile(parts: Sequence[torch.Tensor], share: float) -> float:
    """The least value that `share` of all do not exceed."""
    values = torch.cat(list(parts)).sort().values
    return float(values[math.ceil(share * len(values)) - 1])


def _perplexity(mean_loss: float) -> float:
    """exp, but infinite where a ruined model's loss is beyond the floats."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf if mean_loss == mean_loss else math.nan


def _standard_error(means: Sequence[float]) -> float | None:
    """Of the mean of equally long windows; tokens inside one are correlated, so windows are the samples."""
    count = len(means)
    if count < 2:
        return None
    center = math.fsum(means) / count
    return math.sqrt(math.fsum((mean - center) ** 2 for mean in means) / (count * (count - 1)))
