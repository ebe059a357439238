"""Environment variables that more than one folder knows."""

CPU_BYTES = "QPALETTE_CPU_BYTES"  # products on a CPU in bytes: 0 none, 1 of float32 vectors, too; the commands say 1
PREFILL = "QPALETTE_PREFILL"  # how prompts are multiplied: float or int8, as --prefill of the commands
