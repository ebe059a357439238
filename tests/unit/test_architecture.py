"""The shape of the code, checked: layers, no code execution from data, light imports."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "qpalette").rglob("*.py"))
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec"}
# Code that this machine compiled for this user, in a directory that nobody else can write: as trusted as a .pyc file,
# and numba keeps it no other way.
COMPILED_CODE = {"backends/cpu/jit.py": ["pickle"]}


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def unsafe_uses(source: str) -> list[str]:
    """What in `source` could run code that is in the data it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in UNSAFE_MODULES]
            case ast.ImportFrom(module=module, names=names):
                if (module or "").split(".")[0] in UNSAFE_MODULES:
                    found.append(module)
                if module == "torch":
                    found += [f"torch.{alias.name}" for alias in names if alias.name == "load"]
            case ast.Call(func=ast.Name(id=name)) if name in UNSAFE_CALLS:
                found.append(name)
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                found.append("torch.load")
            case ast.keyword(arg="allow_pickle", value=value) if not _is_false(value):
                found.append("allow_pickle")
    return found


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_folders_import_only_what_lies_below():
    result = python("from importlinter.cli import lint_imports_command as run; run(['--no-cache'])")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_data_is_ever_executed(path):
    allowed = COMPILED_CODE.get(path.relative_to(ROOT / "src" / "qpalette").as_posix(), [])
    assert unsafe_uses(path.read_text(encoding="utf-8")) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import joblib.memory",
        "from pickle import loads",
        "x = torch.load(f)",
        "from torch import load",
        "eval('1')",
        "exec(code)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_check_itself_finds_each(source):
    assert unsafe_uses(source)
    assert not unsafe_uses("model.eval(); np.load(f, allow_pickle=False); safetensors.torch.load(b)")


@pytest.mark.parametrize("module", ["qpalette.core", "qpalette.theory"])
def test_the_bottom_layer_imports_no_torch(module):
    names = [f"{module}.{path.stem}" for path in SOURCES if path.parent.name == module.rsplit(".")[-1]]
    code = f"import importlib, sys; [importlib.import_module(m) for m in {names!r} if not m.endswith('__init__')]"
    result = python(code + "; sys.exit('torch' in sys.modules)")
    assert result.returncode == 0, result.stderr or f"{module} imports torch"


def test_a_package_holds_every_file_that_the_code_reads():
    """What is not Python is installed only if pyproject.toml names it."""
    package = ROOT / "src" / "qpalette"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["qpalette"]
    named = {path for pattern in patterns for path in package.glob(pattern)}
    data = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data == named
