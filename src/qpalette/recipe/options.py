"""How much each step from a budget to a model may cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from qpalette.runtime.device import parse_device
from qpalette.tuning import Tuning


@dataclass(frozen=True)
class Recipe:
    tokens: int  # to calibrate on
    window: int = 2048
    draws: int = 1  # of labels for each token
    bands: int = 6  # as in `calibrated_sensitivities`
    effort: str = "standard"
    tuning: Tuning = field(default_factory=lambda: Tuning(windows=64, keep_size=True))


# By kind of device: a processor reads and tunes on less text, in shorter windows, of which it writes more side by side
# and measures one.
STANDARD = {
    "cuda": Recipe(131_072, tuning=Tuning(steps=100, windows=64, keep_size=True)),
    "cpu": Recipe(32_768, window=1024, tuning=Tuning(steps=40, batch=2, window=512, windows=64, keep_size=True)),
}
BEST = Recipe(262_144, draws=4, bands=10, effort="best", tuning=Tuning(windows=128, keep_size=True))


def recipe_of(best: bool, device: str) -> Recipe:
    """The default for a device, or the best."""
    return BEST if best else STANDARD["cuda" if parse_device(device).type == "cuda" else "cpu"]
