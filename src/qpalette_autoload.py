"""Opt-in: with QPALETTE_AUTOLOAD=1, transformers loads qpalette models in programs that never import qpalette.

torch calls `autoload` at the end of its own import (entry point group `torch.backends`). This module stands beside the
package, so that without the variable nothing of the package is imported.
"""

import os
import warnings


def autoload() -> None:
    """Import the package, which watches for transformers. Never raises: that would break `import torch`."""
    if os.environ.get("QPALETTE_AUTOLOAD") != "1":
        return
    try:
        import qpalette  # noqa: F401
    except Exception as error:
        warnings.warn(f"QPALETTE_AUTOLOAD=1 has no effect, importing qpalette failed: {error!r}", stacklevel=2)
