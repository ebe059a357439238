"""Sensitivities to the error that calibrated rounding leaves, not to white noise: d(KL per token) / d(distortion).

A plan that takes the Kronecker form at its word starves linears whose few large output directions promise too much. So
nothing is taken from it but the shape of the error, E = A R B with R the plain rounding errors of variance D
(`rounding.Shaping`). What that costs is measured on tokens that no Hessian has seen, in three steps:

1. The curvature of every linear: 1/2 E[tr(G^T A R B)^2] / D = 1/2 |A^T G B^T|^2, G the gradient of the weight over a
   window with drawn labels: one backward pass per window is exact to second order, for all linears at once.
2. KL with such noise in the linears of one kind in neighbouring layers: what the second order does not know. The
   curvature says how their loss is shared among them.
3. KL with noise in all linears, at the distortions of a few rates: how far it is from the sum over linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qpalette.calibration.equalize import equalize
from qpalette.calibration.gradients import backward_of_drawn_labels, frozen
from qpalette.calibration.hessians import HessianStore
from qpalette.calibration.rounding import Rounding, Shaping, input_diagonal, prepare
from qpalette.calibration.sensitivity import Divergence, noise_generator
from qpalette.calibration.taps import Weight, weights_of
from qpalette.core.records import LinearGroup
from qpalette.core.resume import PartialFigures
from qpalette.models.kinds import linear_kind
from qpalette.rotate import random_signs, rotation_for
from qpalette.theory import distortion_bound

BANDS = 6  # runs of layers in which the linears of a kind are measured together
BAND_RATE = 2.75  # Shannon's bound there is 0.022, what a trellis leaves at about 2.9 bits
CURVE_RATES = (1.5, 2.0, 2.5, 3.0, 4.0)

Progress = Callable[[int, int], None]
Values = dict[str, float]


class ShapedNoise:
    """What calibrated rounding would leave in the linears of a loaded model, prepared as `quantize` prepares them."""

    def __init__(
        self,
        model: Any,
        groups: Sequence[LinearGroup],
        store: HessianStore,
        rounding: Rounding,
        rotation: str,
        seed: int,
    ) -> None:
        self.groups, self._store, self._rounding = groups, store, rounding
        self._rotation, self._seed = rotation, seed
        self.weights = weights_of(model, [linear.name for group in groups for linear in group.linears])
        self._kept: dict[str, Shaping] = {}

    def keep(self, shapings: dict[str, Shaping]) -> None:
        """Those of some linears, which were prepared before, are not prepared again."""
        self._kept = shapings

    def shapings(self, group: LinearGroup) -> Iterator[tuple[str, Shaping]]:
        """Of each linear of a group, on the device of its weight. Raises HessianError as `prepare`."""
        weights = {linear.name: self.weights[linear.name].values for linear in group.linears}
        if weights.keys() <= self._kept.keys():
            yield from ((name, self._kept[name]) for name in weights)
            return
        device = next(iter(weights.values())).device
        rotation = rotation_for(group.in_features, self._rotation)
        scale = equalize(list(weights.values())) if self._rounding.equalize else None
        diagonal = input_diagonal(scale, random_signs(rotation.dim, self._seed, group.name).to(device))
        for name, weight in weights.items():
            hessian, outputs = self._store.read(group, name), self._store.read_outputs(group, name)
            prepared = prepare(name, weight, rotation, diagonal, hessian, outputs, self._rounding)
            yield name, prepared.shaping

    def draw(self, group: LinearGroup) -> Iterator[tuple[str, Tensor]]:
        """E of unit distortion of each linear of a group, on the CPU, in the type of its weight; always the same."""
        for name, shaping in self.shapings(group):
            values = self.weights[name].values
            noise = torch.randn(values.shape, generator=noise_generator(self._seed, name)).to(values.device)
            yield name, shaping.apply(noise).to("cpu", values.dtype)


def curvatures(
    model: Any,
    windows: Sequence[Tensor],
    noise: ShapedNoise,
    *,
    memory_budget_bytes: int,
    seed: int,
    partial: PartialFigures,
    progress: Progress | None = None,
) -> Values:
    """1/2 |A^T G B^T|^2 per token of each linear: the loss to second order per unit of distortion of R.

    The factors of as many groups as fit `memory_budget_bytes` are held at a time, which is the unit of resuming; where
    those of all do, `noise` keeps them.
    """
    found: Values = partial.figures.setdefault("curvatures", {})
    tokens = sum(len(window) - 1 for window in windows)
    todo = [group for group in noise.groups if any(linear.name not in found for linear in group.linears)]
    for run in _runs(noise, todo, memory_budget_bytes):
        sums = {name: torch.zeros((), dtype=torch.float64, device=shaping.rms.device) for name, shaping in run.items()}
        weights = {name: noise.weights[name] for name in run}
        for number, window in enumerate(windows):
            _add_curvature(model, window, torch.Generator().manual_seed(seed + number), weights, run, sums)
        found |= {name: float(value) / (2 * tokens) for name, value in sums.items()}
        partial.save()
        done = sum(all(linear.name in found for linear in group.linears) for group in noise.groups)
        if progress is not None:
            progress(done, len(noise.groups))
        if len(run) == len(noise.weights):
            noise.keep(run)
    return found


def _runs(noise: ShapedNoise, groups: Iterable[LinearGroup], budget: int) -> Iterator[dict[str, Shaping]]:
    run: dict[str, Shaping] = {}
    for group in groups:
        run |= dict(noise.shapings(group))
        if sum(shaping.nbytes for shaping in run.values()) >= budget:
            yield run
            run = {}
    if run:
        yield run


def _add_curvature(
    model: Any,
    window: Tensor,
    generator: torch.Generator,
    weights: Mapping[str, Weight],
    shapings: Mapping[str, Shaping],
    sums: Mapping[str, Tensor],
) -> None:
    parts: dict[nn.Parameter, list[str]] = {}
    for name, weight in weights.items():
        parts.setdefault(weight.parameter, []).append(name)

    def reducing(names: Sequence[str]) -> Callable[[Tensor], None]:
        def reduce(parameter: Tensor) -> None:
            assert parameter.grad is not None
            for name in names:
                pulled = shapings[name].adjoint(weights[name].of(parameter.grad))
                sums[name] += pulled.double().square().sum()  # on the device: nobody waits for it
            parameter.grad = None

        return reduce

    hooks = [parameter.register_post_accumulate_grad_hook(reducing(names)) for parameter, names in parts.items()]
    try:
        with frozen(model, all_but=parts):
            backward_of_drawn_labels(model, window, generator)
    finally:
        for hook in hooks:
            hook.remove()


def measured_sensitivities(
    divergence: Divergence,
    noise: ShapedNoise,
    prior: Values,
    *,
    bands: int = BANDS,
    partial: PartialFigures,
    progress: Progress | None = None,
) -> tuple[Values, list[tuple[float, float]]]:
    """Sensitivities, the `prior` corrected in each band by the KL that its noise costs; and for noise in all linears
    the pairs (sum of sensitivity times distortion, KL measured), by rising distortion.

    The noise of all linears and their weights are held on the CPU meanwhile. The weights are as before afterwards.
    """
    measured: Values = partial.figures.setdefault("bands", {})
    members = _bands(noise.groups, bands)
    steps = {name: (BAND_RATE, linears) for name, linears in members.items()}
    steps |= {f"all at {rate:g} bits": (rate, list(prior)) for rate in CURVE_RATES}
    if any(step not in measured for step in steps):
        errors = dict(item for group in noise.groups for item in noise.draw(group))
        for done, (step, (rate, linears)) in enumerate(steps.items(), start=1):
            if step not in measured:
                with _added(noise.weights, errors, linears, distortion_bound(rate) ** 0.5):
                    measured[step] = divergence.measure([noise.weights[linear].parameter for linear in linears])
                partial.save()
            if progress is not None:
                progress(done, len(steps))
    values = dict(prior)
    for name, linears in members.items():
        predicted = distortion_bound(BAND_RATE) * sum(prior[linear] for linear in linears)
        factor = max(0.0, measured[name]) / predicted if predicted > 0 else 1.0
        values |= {linear: factor * prior[linear] for linear in linears}
    total = sum(values.values())
    curve = [(total * distortion_bound(rate), measured[f"all at {rate:g} bits"]) for rate in CURVE_RATES]
    return values, sorted(curve)


def _bands(groups: Iterable[LinearGroup], count: int) -> dict[str, list[str]]:
    """The linears of each kind, in at most `count` runs of layers."""
    kinds: dict[str, list[str]] = {}
    for linear in (linear for group in groups for linear in group.linears):
        kinds.setdefault(linear_kind(linear.name), []).append(linear.name)
    return {
        f"{kind} {number}": linears[len(linears) * number // count : len(linears) * (number + 1) // count]
        for kind, linears in kinds.items()
        for number in range(count)
        if len(linears) * number // count < len(linears) * (number + 1) // count
    }


@contextmanager
def _added(
    weights: Mapping[str, Weight], errors: Mapping[str, Tensor], linears: Iterable[str], size: float
) -> Iterator[None]:
    """`size` times their error is in some linears."""
    before = {name: weights[name].values.to("cpu", copy=True) for name in linears}
    try:
        for name, values in before.items():
            weights[name].values.copy_(values + size * errors[name])
        yield
    finally:
        for name, values in before.items():
            weights[name].values.copy_(values)
