"""How much the loss rises with each linear's distortion: d(KL per token) / d(mean squared error over mean square).

The noise is that of a rotated quantizer with row scales: white along a row, its variance in proportion to the row's
mean square. Sources: Kullback-Leibler divergence to second order is half the Fisher form (Kullback, Information Theory
and Statistics, 1959, section 2.6); labels drawn from the model make one backward pass an unbiased estimate of the
diagonal (Martens, "New insights and perspectives on the natural gradient method", JMLR 21, 2020, section 5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qpalette.calibration.continued import Continued
from qpalette.calibration.equalize import row_mean_square
from qpalette.calibration.gradients import backward_of_drawn_labels, frozen
from qpalette.calibration.taps import Weight, weights_of
from qpalette.core.errors import InputError
from qpalette.core.resume import PartialFigures

CHUNK = 256  # positions whose log-probabilities are held in float32 at a time: 250 MB at a vocabulary of 256k
METHODS = ("fisher", "perturbation")
PARTS = 8  # of the layers, from which a measurement may begin
DISTORTION = 0.01  # of the noise: small enough for the loss to be linear, large enough to stand out of rounding

Progress = Callable[[int, int], None]


def embeddings_of(model: Any) -> list[str]:
    """Names of the token embedding and, where it has a weight of its own, of the output head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights: dict[int, str] = {}
    for module in modules:
        name = next((name for name, other in model.named_modules() if other is module), None)
        if name and isinstance(getattr(module, "weight", None), nn.Parameter):
            weights.setdefault(id(module.weight), name)
    return list(weights.values())


def fisher_sensitivities(
    model: Any,
    windows: Sequence[Tensor],
    names: Sequence[str],
    *,
    seed: int = 0,
    partial: PartialFigures | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """a_l = 1/2 sum_ij F_ij (mean square of row i), F the Fisher diagonal per token, by one backward pass per window.

    `model` is a transformers model in evaluation mode; `windows` are int64 [length >= 2] each. The labels of each
    window are drawn from the model's own predictions. A gradient is reduced to one number and freed as soon
    as it is known.

    Raises InputError when there is no window or a gradient is not finite, CheckpointError as `weights_of`.
    """
    if not windows:
        raise InputError("there is no text to measure sensitivities on")
    parts: dict[nn.Parameter, dict[str, Weight]] = {}
    for name, weight in weights_of(model, names).items():
        parts.setdefault(weight.parameter, {})[name] = weight
    figures = {} if partial is None else partial.figures
    sums = figures.setdefault("sums", dict.fromkeys(names, 0.0))
    hooks = [_reduce_gradient(parameter, weights, sums) for parameter, weights in parts.items()]
    try:
        for index in range(figures.get("windows", 0), len(windows)):
            with frozen(model, all_but=parts):
                backward_of_drawn_labels(model, windows[index], torch.Generator().manual_seed(seed + index))
            figures["windows"] = index + 1
            if partial is not None:
                partial.save()
            if progress is not None:
                progress(index + 1, len(windows))
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(len(window) - 1 for window in windows)
    return {name: _finite(name, sums[name] / tokens) for name in names}


def _reduce_gradient(parameter: nn.Parameter, weights: Mapping[str, Weight], sums: dict[str, float]) -> Any:
    def hook(reached: Tensor) -> None:
        assert reached.grad is not None
        for name, weight in weights.items():
            square = weight.of(reached.grad).float().square().sum(1)
            sums[name] += 0.5 * float((square * row_mean_square(weight.values)).double().sum())
        reached.grad = None

    return parameter.register_post_accumulate_grad_hook(hook)


def _finite(name: str, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise InputError(f"the sensitivity of {name} is {value}: the model overflows; measure in float32")
    return value


class Divergence:
    """KL(reference || model) per token on some windows, where the reference is the model as it is now.

    The reference's log-probabilities are kept, float32 [length - 1, vocabulary] per window, on the model's device, and
    what `Continued` keeps for `parts` runs of layers.
    """

    def __init__(self, model: Any, windows: Sequence[Tensor], parts: int = PARTS) -> None:
        if not windows:
            raise InputError("there is no text to measure sensitivities on")
        self.windows, self._model = windows, Continued(model, windows, parts)
        self._reference = [_log_probabilities(self._model.first(index)) for index in range(len(windows))]

    def measure(self, changed: Collection[nn.Parameter] = ()) -> float:
        """Of the model as it is now, from the reference, of which all parameters but `changed` are; () is all."""
        total = torch.zeros((), dtype=torch.float64, device=self._reference[0].device)
        for index, true in enumerate(self._reference):
            mine = _log_probabilities(self._model.logits(index, changed))
            for rows in map(slice, range(0, len(mine), CHUNK), range(CHUNK, len(mine) + CHUNK, CHUNK)):
                total += (true[rows].exp() * (true[rows] - mine[rows])).sum(-1).double().sum()
        return float(total) / sum(len(window) - 1 for window in self.windows)


@torch.inference_mode()
def _log_probabilities(logits: Tensor) -> Tensor:
    return logits[:-1].float().log_softmax(-1)


def perturbation_sensitivities(
    model: Any,
    windows: Sequence[Tensor],
    names: Sequence[str],
    *,
    distortion: float = DISTORTION,
    seed: int = 0,
    partial: PartialFigures | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """a_l = (rise of KL per token) / `distortion`, with noise of that distortion in one linear at a time.

    Takes one pass over `windows` per linear. Raises as `fisher_sensitivities`.
    """
    weights = weights_of(model, names)
    figures = {} if partial is None else partial.figures
    divergence: Divergence | None = None
    for done, (name, weight) in enumerate(weights.items(), start=1):
        if name not in figures:
            divergence = divergence or Divergence(model, windows)
            original = weight.values.clone()
            add_noise(weight.values, distortion, noise_generator(seed, name))
            figures[name] = _finite(name, max(0.0, divergence.measure([weight.parameter])) / distortion)
            weight.values.copy_(original)
            if partial is not None:
                partial.save()
        if progress is not None:
            progress(done, len(weights))
    return {name: figures[name] for name in names}


@torch.no_grad()
def add_noise(weight: Tensor, distortion: float, generator: torch.Generator) -> None:
    """Add what a rotated quantizer of that distortion adds: white along each row of `weight` [M, K], in place."""
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    weight += (noise * (distortion * row_mean_square(weight)).sqrt()[:, None]).to(weight.dtype)


def noise_generator(seed: int, name: str) -> torch.Generator:
    """The same noise for the same linear, whichever others are measured."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
