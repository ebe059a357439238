"""vLLM has an environment of its own, which `python3 dev.py test-vllm` makes."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))  # tiny models are made there

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two ranks share the cores of a small machine
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
