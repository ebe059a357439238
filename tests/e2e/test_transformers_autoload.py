"""How transformers learns of the method: in a fresh interpreter each, since it happens at import."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from tiny_model import save_pair

import qpalette_autoload

LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
print(type(model.model.layers[0].mlp.up_proj).__name__, flush=True)
"""
ORDERS = {
    "qpalette first": "import qpalette.core",
    "transformers used first": "from transformers import AutoModelForCausalLM; import qpalette",
    "table first": "import transformers.quantizers.auto; import qpalette",
    "our integration first": "import qpalette.integrations.transformers",
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return save_pair(tmp_path_factory.mktemp("pair"), "llama")[0]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("QPALETTE_", "TRANSFORMERS_"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=300
    )


def load(directory: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess:
    return python(f"DIRECTORY = {str(directory)!r}\n{before}\n{LOAD}", **environment)


@pytest.mark.parametrize("before", ORDERS.values(), ids=ORDERS.keys())
def test_loads_in_any_order_of_imports(packed, before):
    result = load(packed, before)
    assert result.stdout.strip() == "QuantLinear", result.stderr


@pytest.mark.parametrize("before", ["", "from transformers.quantizers.auto import AutoHfQuantizer", "import torch"])
def test_autoload_needs_no_import_of_ours(packed, before):
    result = load(packed, before, QPALETTE_AUTOLOAD="1")
    assert result.stdout.strip() == "QuantLinear", result.stderr


def test_without_either_transformers_warns_and_the_weights_are_random(packed):
    """The trap itself: if this ever fails, transformers has become better, and the documented warning can go."""
    result = load(packed)
    assert result.stdout.strip() == "Linear", result.stderr
    assert "Unknown quantization type, got qpalette" in result.stderr


def test_importing_torch_imports_nothing_of_ours_unasked():
    code = "import torch, sys; print('qpalette' in sys.modules)"
    assert python(code).stdout.strip() == "False"
    assert python(code, QPALETTE_AUTOLOAD="0").stdout.strip() == "False"
    assert python(code, QPALETTE_AUTOLOAD="1").stdout.strip() == "True"


def test_importing_us_imports_neither_torch_nor_transformers():
    code = "import qpalette, sys; print(qpalette.__version__, {'torch', 'transformers'} & set(sys.modules))"
    result = python(code)
    assert result.stdout.endswith("set()\n"), result.stdout + result.stderr


def test_the_entry_point_is_installed():
    found = [point for point in entry_points(group="torch.backends") if point.name == "qpalette"]
    assert [point.load() for point in found] == [qpalette_autoload.autoload]


def test_a_failing_import_warns_instead_of_breaking_torch(monkeypatch):
    monkeypatch.setenv("QPALETTE_AUTOLOAD", "1")
    monkeypatch.setitem(sys.modules, "qpalette", None)  # makes `import qpalette` raise
    with pytest.warns(UserWarning, match="QPALETTE_AUTOLOAD=1 has no effect"):
        qpalette_autoload.autoload()


def test_lazy_names_resolve():
    import qpalette
    import qpalette.evaluate.windows  # must not put the folder in the function's place

    for name in ("evaluate", "load", "parse_spec"):
        assert callable(getattr(qpalette, name)), name
        assert name in dir(qpalette)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        qpalette.nonsense  # noqa: B018
