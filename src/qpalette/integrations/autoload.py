"""Registers the quantization method with transformers, and packed linears with peft, once they are there.

Imports nothing heavy.

Without registration `from_pretrained` warns, skips the packed tensors and returns random weights. So importing any part
of qpalette watches for the import of transformers' table of methods, in whichever order the two packages come.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRATION = "qpalette.integrations.transformers"  # importing it registers
TABLE = "transformers.quantizers.auto"
# The second one matters when torch, and with it this hook, is first imported in the middle of the table's own import.
TRIGGERS = {TABLE: REGISTRATION, "transformers.modeling_utils": REGISTRATION}
TRIGGERS["peft.tuners.lora.model"] = "qpalette.integrations.peft"


class _Watcher(MetaPathFinder):
    """Finds nothing itself: adds the registration to the end of a trigger's import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in TRIGGERS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            _register_after(spec.loader, TRIGGERS[fullname])
        return spec


def _register_after(loader: object, registration: str) -> None:
    execute = loader.exec_module  # type: ignore[attr-defined]

    def exec_module(module: ModuleType) -> None:
        execute(module)
        import_module(registration)

    loader.exec_module = exec_module  # type: ignore[attr-defined]


def install() -> None:
    """Register now with what is there, and with the rest as soon as it is. Calling it again changes nothing."""
    waiting = False
    for name in (TABLE, "peft.tuners.lora.model"):
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            import_module(TRIGGERS[name])
        else:
            waiting = True
    if waiting and not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
