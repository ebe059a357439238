"""The errors a user can meet. Each message names the thing that is wrong and the way out."""


class QPaletteError(Exception):
    """Base of every error raised on purpose; the command line prints it as one line."""


class SpecError(QPaletteError):
    """A quantizer, rate or rotation name that means nothing, or a value out of its range."""


class BudgetError(SpecError):
    """A budget that nothing can meet; it holds the least that is possible, where one figure tells it."""

    def __init__(
        self,
        message: str,
        least_bits: int | None = None,
        least_seconds: float | None = None,
        least_memory: int | None = None,
    ) -> None:
        super().__init__(message)
        self.least_bits, self.least_seconds, self.least_memory = least_bits, least_seconds, least_memory


class CheckpointError(QPaletteError):
    """A source model that cannot be read: missing, truncated, or inconsistent."""


class ArtifactError(QPaletteError):
    """A quantized model directory that breaks one of the invariants of docs/format.md."""


class HessianError(QPaletteError):
    """Second moments for calibrated rounding that are missing, of another model, or not usable."""


class UnsupportedError(QPaletteError):
    """No backend can do what was asked; the message lists the reason of each."""


class InputError(QPaletteError):
    """A text file, prompt or option that cannot be used."""


class BusyError(InputError):
    """Something that another run is writing."""
