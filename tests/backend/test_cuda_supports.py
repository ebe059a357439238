"""What the CUDA backend says that it can do is true, and what a user without a compiler gets."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from qpalette.backends.cuda.backend import CudaBackend
from qpalette.core.errors import UnsupportedError
from qpalette.runtime import dispatch, select

CUDA = torch.device("cuda")
module = import_module("qpalette.backends.cuda.backend")  # the folder's attribute of this name is the backend


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with one H100 and everything installed."""
    for cached in (dispatch._select, module._warn_of_no_compiler):
        cached.cache_clear()
    monkeypatch.delenv("QPALETTE_BACKEND", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(module, "compiler_is_installed", lambda: True)
    yield monkeypatch
    dispatch._select.cache_clear()


def reason(device: torch.device = CUDA) -> str:
    verdicts = {CudaBackend().supports(operation, "tcq2-3.25", device) for operation in ("encode", "linear")}
    (verdict,) = verdicts
    assert verdict.ok == (verdict.reason == "")
    return verdict.reason


def test_a_device_with_everything(gpu: pytest.MonkeyPatch) -> None:
    assert reason() == ""
    assert select("linear", "tcq2-3.25", CUDA).name == "cuda"


def test_without_a_compiler(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(module, "compiler_is_installed", lambda: False)
    assert "pip install 'qpalette[cuda]'" in reason()


def test_on_rocm(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.version, "hip", "6.4")
    assert "AMD" in reason()


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_on_an_old_device(gpu: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert "compute capability 8.0, and cuda has {}.{}".format(*capability) in reason()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (12, 0)])
def test_on_a_newer_one(gpu: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert reason() == ""


def test_on_no_device(gpu: pytest.MonkeyPatch) -> None:
    assert "no device cuda:1" in reason(torch.device("cuda:1"))
    gpu.setattr(torch.cuda, "device_count", lambda: 0)
    assert "no device cuda" in reason()


def test_a_model_answers_without_a_compiler_and_the_user_is_told_once(
    gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.setattr(module, "compiler_is_installed", lambda: False)
    for spec in ("tcq2-3.25", "tcq-2", "vq-3"):
        assert select("linear", spec, CUDA).name == "ref"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "pip install 'qpalette[cuda]'" in record.getMessage()
    assert "\n" not in record.getMessage()
    with pytest.raises(UnsupportedError, match="pip install"):
        select("linear", "tcq-2", CUDA, prefer="cuda")
