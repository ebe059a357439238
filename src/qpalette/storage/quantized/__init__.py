"""Checkpoints that another tool has quantized, seen as plain ones. A format is one file: the folder imports itself."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
