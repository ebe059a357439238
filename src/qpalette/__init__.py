"""Post-training quantization of language models at any rate, near Shannon's bound.

Importing the package is cheap: torch and transformers load with the first name that needs them. It also makes
`transformers` able to load quantized models, whichever of the two is imported first.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from qpalette.integrations.autoload import install as _install

_HOME = {
    "Config": "qpalette.integrations.on_load",
    "cache": "qpalette.api",
    "compress": "qpalette.recipe",
    "load": "qpalette.api",
    "parse_spec": "qpalette.codes",
    "quantize": "qpalette.pipeline",
    "tune": "qpalette.tuning",
}

__all__ = [
    "Config",
    "__version__",
    "cache",
    "calibrate",
    "compress",
    "evaluate",
    "load",
    "parse_spec",
    "quantize",
    "tune",
]


class _Package(ModuleType):
    """`calibrate` and `evaluate` are functions, always; importing the folders of that name would put modules there."""

    @property
    def calibrate(self) -> Any:
        return import_module("qpalette.api").calibrate

    @calibrate.setter
    def calibrate(self, folder: ModuleType) -> None:
        """As `evaluate`."""

    @property
    def evaluate(self) -> Any:
        return import_module("qpalette.evaluate").evaluate

    @evaluate.setter
    def evaluate(self, folder: ModuleType) -> None:
        """Called by the import of the folder. `from qpalette.evaluate import ...` works as for any other."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("qpalette")
    if name not in _HOME:
        raise AttributeError(f"module 'qpalette' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
_install()
