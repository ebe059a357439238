"""How much each step from a budget to a model may cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from qpalette.evaluate.sampled_text import LEAST
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

    def of(self, tokens: int | None, steps: int | None, effort: str | None, written: bool) -> Recipe:
        """With what is given. Little text that is `written` by the model is windows enough to be written side by side:
        a step takes as long for fewer."""
        changed: dict[str, Any] = {"tokens": tokens, "effort": effort}
        if tokens is not None and written:
            changed["window"] = min(self.window, max(LEAST, tokens // LEAST))
        if steps is not None:
            changed["tuning"] = replace(self.tuning, steps=steps)
        return replace(self, **{name: value for name, value in changed.items() if value is not None})


# By kind of device: a processor reads and tunes on less text, in shorter windows, of which it writes more side by side
# and measures one. It keeps activations while it tunes, of windows half as long as calibration has: a step of SmolLM2
# takes 20.8 s of a core instead of 27.3.
_ON_CPU = Tuning(steps=40, batch=2, window=512, windows=64, keep_size=True, recompute=False)
STANDARD = {
    "cuda": Recipe(131_072, tuning=Tuning(steps=100, windows=64, keep_size=True)),
    "cpu": Recipe(32_768, window=1024, tuning=_ON_CPU),
}
BEST = Recipe(262_144, draws=4, bands=10, effort="best", tuning=Tuning(windows=128, keep_size=True))


def recipe_of(best: bool, device: str) -> Recipe:
    """The default for a device, or the best."""
    return BEST if best else STANDARD["cuda" if parse_device(device).type == "cuda" else "cpu"]
