"""From moments of keys to the transforms that a plan asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qpalette.kvcache.codes import parse_code
from qpalette.kvcache.moments import KeyMoments
from qpalette.kvcache.plan import BALANCED, MEAN, SHAPED, CachePlan
from qpalette.kvcache.shaping import shaped
from qpalette.kvcache.transform import Transform, balanced, mean_removed


def key_transforms(plan: CachePlan, moments: Sequence[KeyMoments]) -> list[Transform]:
    """Of each layer's keys, for a plan that is not white. Raises SpecError for a plan of another number of layers, and
    as `shaped`."""
    alike: dict[tuple[str, int], list[int]] = {}  # layers whose heads are made together: a head is little work
    for layer, moment in enumerate(moments):
        code = plan.of_layer(layer, len(moments))[0]
        alike.setdefault((code, moment.mean.shape[-1]), []).append(layer)
    found: dict[int, Transform] = {}
    for (code, _), layers in alike.items():
        chosen = [moments[layer] for layer in layers]
        together = _made(plan.transform, code, [torch.cat(part) for part in zip(*map(_parts, chosen), strict=True)])
        heads = [len(moment.mean) for moment in chosen]
        apart = (each.laid_out() for each in together.split(heads))
        found |= dict(zip(layers, apart, strict=True))
    return [found[layer] for layer in range(len(moments))]


def _parts(moments: KeyMoments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return moments.mean, moments.covariance, moments.queries


def _made(transform: str, code: str, parts: Sequence[torch.Tensor]) -> Transform:
    mean, covariance, queries = parts
    if transform == SHAPED:
        return shaped(mean, covariance, queries, parse_code(code).distortion)
    if transform == BALANCED:
        return balanced(mean, covariance, queries)
    assert transform == MEAN
    return mean_removed(mean, covariance)
