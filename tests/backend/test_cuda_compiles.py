"""CUDA kernels compile for every architecture that we promise, on a machine with no GPU."""

import pytest

from qpalette.core.errors import UnsupportedError
from qpalette.quantizers import parse_spec
from qpalette.quantizers.trellis import Trellis

pytest.importorskip("cuda.core", reason="needs qpalette[cuda]")

from qpalette.backends.cuda.trellis_encoder import SOURCE, plan_launch
from qpalette.kernels.nvrtc import compile_cubin

# Dynamic shared memory that a block may ask for (CUDA C++ Programming Guide, technical specifications), in KiB.
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}


def macros(spec: str, shared_kib: int) -> tuple[tuple[str, int], ...]:
    quantizer = parse_spec(spec)
    assert isinstance(quantizer, Trellis)
    low, high = int(quantizer.shifts().min()), int(quantizer.shifts().max())
    values = quantizer.values_per_step
    launch = plan_launch(quantizer.memory, values, quantizer.steps, low, high, shared_kib * 1024 - 2048)
    assert launch.shared_bytes <= shared_kib * 1024 - 2048
    return launch.macros


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPALETTE_CACHE", str(tmp_path))


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("spec", ["tcq-3", "tcq2-3.25"])
def test_the_encoder_compiles(spec: str, arch: str) -> None:
    assert compile_cubin(SOURCE, arch, macros(spec, SHARED[arch])).startswith(b"\x7fELF")


@pytest.mark.parametrize("spec", ["tcq-1", "tcq-8-L12", "tcq-2.5-L20", "tcq2-5-L12", "tcq2-1"])
def test_extreme_rates_compile(spec: str) -> None:
    assert compile_cubin(SOURCE, "sm_90", macros(spec, SHARED["sm_90"])).startswith(b"\x7fELF")


def test_compiled_code_is_kept_and_found_again(tmp_path) -> None:
    compile_cubin.cache_clear()
    first = compile_cubin(SOURCE, "sm_90", macros("tcq-4", 227))
    (stored,) = (tmp_path / "kernels").iterdir()
    assert stored.read_bytes() == first
    compile_cubin.cache_clear()
    stored.write_bytes(b"\x7fELF and what another process wrote")
    assert compile_cubin(SOURCE, "sm_90", macros("tcq-4", 227)) == b"\x7fELF and what another process wrote"
    compile_cubin.cache_clear()


def test_a_refusal_of_the_compiler_is_told() -> None:
    with pytest.raises(UnsupportedError, match="does not compile for sm_90"):
        compile_cubin("this is not C++", "sm_90", ())
