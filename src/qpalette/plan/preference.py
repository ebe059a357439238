"""Quality or speed: of the quantizers of one rate, which is offered to a budget in bits or bytes.

One rule: the fastest, on the device that the model is for, whose distortion is at most so much above the least there is
at its rate. How fast each is comes from a latency profile. Processors have none: there it is the least distortion, and
rates above MOST_RATE_IN_BYTES, which take several times as long, are left out of a plan that so loses at most as much
more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch

from qpalette.codes import parse_spec
from qpalette.core.errors import SpecError
from qpalette.plan.build import Candidate, Quick
from qpalette.plan.profile import LatencyProfile, shipped_profiles

# Distortion over the least, at most. On an H100 tcq2 takes two thirds to three quarters of the time of tcq at equal
# rate, for up to 9 % more distortion below 4 bits, 11 % at 4, and 19 % at 4.75 (benchmarks/results/palette_h100.json).
ALLOWED = {"quality": 1.0, "balanced": 1.1, "speed": 1.2}
TARGETS = ("cpu", "cuda")
MOST_RATE_IN_BYTES = Fraction(4)  # that processors multiply in bytes; above it is float32


def preferred(palette: Sequence[Candidate], prefer: str, profile: LatencyProfile | None) -> tuple[Candidate, ...]:
    """The part of `palette` that `prefer` ("quality", "balanced" or "speed") offers: all of it for "quality" or without
    a profile, else one candidate for each rate. Raises SpecError for another preference."""
    allowed = _allowed(prefer)
    if prefer == "quality" or profile is None:
        return tuple(palette)
    seconds = profile.seconds_by_spec(min(profile.batches))
    by_rate: dict[object, list[Candidate]] = {}
    for candidate in palette:
        by_rate.setdefault(candidate.rate, []).append(candidate)
    return tuple(_fastest(candidates, allowed, seconds) for candidates in by_rate.values())


def quick_part(palette: Sequence[Candidate], prefer: str, target: str | None, device: str = "cpu") -> Quick | None:
    """What a plan for a processor makes do with where it may; None for a GPU, and where quality is preferred. Raises
    SpecError as `preferred` and `profile_of`."""
    allowed = _allowed(prefer)
    part = tuple(candidate for candidate in palette if candidate.rate <= MOST_RATE_IN_BYTES)
    if prefer == "quality" or _target(target, device) != "cpu" or len(part) in (0, len(palette)):
        return None
    return Quick(part, allowed)


def profile_of(target: str | None, device: str = "cpu") -> LatencyProfile | None:
    """The profile that comes with qpalette for a model that is to run on `target`; None for "cpu".

    "cuda" takes the profile of the GPU that is here; without one, or without a profile of it, the first there is. None
    is "cuda" where `device` is a CUDA device or this machine has one, and else "cpu". Raises SpecError for another
    target.
    """
    if _target(target, device) == "cpu":
        return None
    profiles = [LatencyProfile.read(name) for name in shipped_profiles()]
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return next((profile for profile in profiles if profile.device == here), profiles[0])


def _allowed(prefer: str) -> float:
    if prefer not in ALLOWED:
        raise SpecError(f"'{prefer}' is no preference: choose {', '.join(ALLOWED)}")
    return ALLOWED[prefer]


def _target(target: str | None, device: str) -> str:
    if target is None:
        target = "cuda" if device.startswith("cuda") or torch.cuda.is_available() else "cpu"
    if target not in TARGETS:
        raise SpecError(f"'{target}' is no target: choose {', '.join(TARGETS)}")
    return target


def _fastest(candidates: Sequence[Candidate], allowed: float, seconds: Mapping[str, float]) -> Candidate:
    """The one of least distortion where nobody measured it: what is faster than that is not known."""
    best = min(candidates, key=lambda candidate: candidate.distortion)
    near = [candidate for candidate in candidates if candidate.distortion <= allowed * best.distortion]
    # A longer search changes which codes are stored, not how they are read.
    timed = {candidate: seconds.get(parse_spec(candidate.spec).with_effort("standard").name) for candidate in near}
    if timed[best] is None:
        return best
    return min(near, key=lambda candidate: (timed[candidate] or float("inf"), candidate.distortion))
