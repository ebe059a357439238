"""What a long measurement keeps, so that it can be interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpalette.core.files import write_whole


class PartialFigures:
    """What was measured so far, in one small JSON file: a second run with the same `identity` goes on from it."""

    def __init__(self, file: str | Path, identity: Mapping[str, str]) -> None:
        self.file, self.identity = Path(file), dict(identity)
        self.figures: dict[str, Any] = {}
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            if content["identity"] == self.identity:
                self.figures = content["figures"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none, or half of one: start again

    def save(self) -> None:
        write_whole(self.file, json.dumps({"identity": self.identity, "figures": self.figures}))

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
