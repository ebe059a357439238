"""Which code each stream of a cache gets: as a short text, "vq-3", or as a file with a code for each layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from qpalette.core.errors import SpecError
from qpalette.kvcache.codes import parse_code
from qpalette.kvcache.stream import Exact
from qpalette.kvcache.vectors import VectorFormat

CACHE_PLAN_VERSION = 1
CACHE_PLAN_FILE = "qpalette_cache.json"  # in a quantized model's directory
SHAPED, BALANCED, MEAN, WHITE = TRANSFORMS = ("shaped", "balanced", "mean", "white")
_FIELDS = {"cache_plan_version", "transform", "sinks", "window", "keys", "values"}
_MOST_EXACT = 1 << 20
EXACT = Exact()  # where nothing is said


@dataclass(frozen=True)
class CachePlan:
    """Codes of keys and values, by layer; of one entry: the same in all layers.

    transform: what keys are coded after: "white" needs no calibration, the others do (`transform.py`, `shaping.py`).
    Values are always white.
    exact: which tokens are kept as they are.

    Raises SpecError for a code, transform or number that means nothing.
    """

    keys: tuple[str, ...]
    values: tuple[str, ...]
    transform: str = SHAPED
    exact: Exact = EXACT

    def __post_init__(self) -> None:
        if self.transform not in TRANSFORMS:
            raise SpecError(f"'{self.transform}' is no transform of a cache: choose {', '.join(TRANSFORMS)}")
        if not self.keys or not self.values:
            raise SpecError("a cache needs a code for keys and one for values")
        for number in (self.exact.sinks, self.exact.window):
            if type(number) is not int or not 0 <= number < _MOST_EXACT:
                raise SpecError(f"sinks and window are whole numbers of at least 0, got {number!r}")
        for field in ("keys", "values"):
            object.__setattr__(self, field, tuple(parse_code(name).name for name in getattr(self, field)))

    def of_layer(self, layer: int, layers: int) -> tuple[str, str]:
        """The codes of keys and values of one of `layers`. Raises SpecError for a plan of another number of them."""
        chosen = []
        for names in (self.keys, self.values):
            if len(names) not in (1, layers):
                raise SpecError(f"the cache plan has {len(names)} layers, and this model {layers}: plan it anew")
            chosen.append(names[layer if len(names) > 1 else 0])
        return chosen[0], chosen[1]

    def formats(self, layer: int, layers: int, dims: tuple[int, int]) -> tuple[VectorFormat, VectorFormat]:
        """Of keys and values of `dims` numbers a head. A key is read along itself, so that its scale is unbiased once
        the mean is gone; as long as it is there, the mean, which softmax does not see, is what a scale should serve."""
        keys, values = map(parse_code, self.of_layer(layer, layers))
        return (
            VectorFormat(keys, dims[0], unbiased=self.transform != WHITE),
            VectorFormat(values, dims[1], unbiased=False),
        )

    def bits(self, shapes: Sequence[tuple[int, int, int]]) -> Fraction:
        """Stored bits per cached number, everything but exact tokens counted; `shapes` has (heads, numbers of a key,
        of a value) for each layer."""
        total = numbers = Fraction(0)
        for layer, (heads, *dims) in enumerate(shapes):
            for format in self.formats(layer, len(shapes), (dims[0], dims[1])):
                total += heads * format.dim * format.bits
                numbers += heads * format.dim
        return total / numbers

    def __str__(self) -> str:
        """As `parse_cache` reads it; of a plan with layers of their own, a summary."""
        keys, values = (names[0] if len(set(names)) == 1 else "mixed" for names in (self.keys, self.values))
        text = keys if keys == values else f"{keys}/{values}"
        head = "" if self.transform == SHAPED else f"{self.transform}:"
        tail = "" if self.exact == EXACT else f",sinks={self.exact.sinks},window={self.exact.window}"
        return head + text + tail

    def to_json(self) -> str:
        """The file. `from_json` of it gives an equal plan."""
        return json.dumps(self.content, indent=1)

    @property
    def content(self) -> dict[str, Any]:
        """What the file says; `from_content` reads it."""
        return {
            "cache_plan_version": CACHE_PLAN_VERSION,
            "transform": self.transform,
            "sinks": self.exact.sinks,
            "window": self.exact.window,
            "keys": list(self.keys),
            "values": list(self.values),
        }

    @classmethod
    def from_json(cls, text: str, source: str = "the cache plan") -> CachePlan:
        """Raises SpecError naming `source` and what is wrong."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{source}: no valid JSON ({error})") from error
        return cls.from_content(content, source)

    @classmethod
    def from_content(cls, content: Any, source: str = "the cache plan") -> CachePlan:
        """The same from JSON that was read."""
        if not isinstance(content, dict) or content.keys() != _FIELDS:
            raise SpecError(f"{source}: a cache plan is a JSON object of {', '.join(sorted(_FIELDS))}")
        if type(content["cache_plan_version"]) is not int or content["cache_plan_version"] != CACHE_PLAN_VERSION:
            version = content["cache_plan_version"]
            raise SpecError(f"{source}: cache_plan_version is {version!r}, this release reads {CACHE_PLAN_VERSION}")
        for field in ("keys", "values"):
            names = content[field]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise SpecError(f"{source}: {field} must be a list of codes, one for each layer, or one for all")
        if not isinstance(content["transform"], str):
            raise SpecError(f"{source}: transform must be one of {', '.join(TRANSFORMS)}")
        exact = Exact(content["sinks"], content["window"])
        try:
            return cls(tuple(content["keys"]), tuple(content["values"]), content["transform"], exact)
        except SpecError as error:
            raise SpecError(f"{source}: {error}") from error


def parse_cache(text: str) -> CachePlan:
    """What --cache takes: the name of a plan file that ends in .json, or [TRANSFORM:]CODE[/CODE of values]
    [,sinks=N][,window=N]: "vq-3", "white:nuq-4", "vq-3/vq-2.5,sinks=8". Raises SpecError."""
    if text.endswith(".json"):
        return read_cache_plan(text)
    codes, *options = text.split(",")
    transform, colon, names = codes.rpartition(":")
    keys, _, values = names.partition("/")
    numbers = {"sinks": EXACT.sinks, "window": EXACT.window}
    for option in options:
        name, equals, number = option.partition("=")
        if name not in numbers or not equals or not (number.isdecimal() and len(number) < 8):
            raise SpecError(
                f"'{text[:60]}' is no cache: sinks=N and window=N may follow the codes, not '{option[:20]}'"
            )
        numbers[name] = int(number)
    return CachePlan((keys,), (values or keys,), transform if colon else SHAPED, Exact(**numbers))


def read_cache_plan(file: str | Path) -> CachePlan:
    """Raises SpecError naming the file and what is wrong with it."""
    path = Path(file).expanduser()
    try:
        return CachePlan.from_json(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise SpecError(f"{path} does not exist; `qpalette plan MODEL --cache-out {path}` writes one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from error
