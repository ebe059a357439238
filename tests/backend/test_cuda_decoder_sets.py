"""How many kernels the CUDA products of a model need, checked without a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qpalette.backends.cuda import decoder_sets, segments
from qpalette.backends.cuda.decoder import DecoderSpec, decoder_spec
from qpalette.backends.cuda.decoder_sets import DecoderSets, expect
from qpalette.backends.cuda.multiply import SOURCE, kernel_macros, source_for
from qpalette.backends.cuda.segments import DeviceLimits
from qpalette.codes import full_palette
from qpalette.core.records import LinearRecord
from qpalette.nn import QuantLinear
from qpalette.runtime import select

BATCHES = (1, 2, 4, 8, 16)
LAUNCHES = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


LIMITS = DeviceLimits(132, 227 << 10, (9, 0))


def kernel_of(launch: tuple[DecoderSpec, ...], batch: int) -> tuple[Any, tuple[int, ...]]:
    return segments.kernel_of(SOURCE, "multiply", tuple(kernel_macros(LIMITS, batch).items()), launch, 0)


def decoder_of(spec: str) -> DecoderSpec:
    decoder = decoder_spec(spec)
    assert decoder is not None
    return decoder


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A device that collects the source of each kernel that is loaded."""
    loaded: list[str] = []
    monkeypatch.setattr(segments, "device_limits", lambda device: LIMITS)
    monkeypatch.setattr(segments, "load_kernel", lambda source, *_: loaded.append(source) or source)
    for cached in (segments.kernel_of, segments._sets):
        cached.cache_clear()
    yield loaded
    for cached in (segments.kernel_of, segments._sets):
        cached.cache_clear()


def mixed_plan() -> list[tuple[DecoderSpec, ...]]:
    """The launches of 32 layers at 3.25 bits on average, with every spec from 2.5 to 4 bits in them."""
    specs = [quantizer.name for quantizer in full_palette() if 2.5 <= quantizer.rate <= 4]
    chooser = random.Random(0)
    return [tuple(decoder_of(chooser.choice(specs)) for _ in launch) for _ in range(32) for launch in LAUNCHES]


def test_a_plan_of_many_specs_needs_few_kernels(sources: list[str]) -> None:
    launches = mixed_plan()
    assert len(set(launches)) > 60, "or a kernel for each would do"
    codes = [torch.zeros(1, dtype=torch.int32) for launch in launches for _ in launch]
    for tensor, decoder in zip(codes, (decoder for launch in launches for decoder in launch), strict=True):
        expect(tensor, decoder)
    for batch in BATCHES:
        sources.clear()
        for launch in launches:
            kernel, indices = kernel_of(launch, batch)
            compiled = kernel.splitlines()[0].removeprefix("#define DECODERS ")
            names = [name + ">" for name in compiled.removesuffix(">").split(">, ")]
            assert [names[i] for i in indices] == [decoder.type_name for decoder in launch]
        assert len(set(sources)) <= 8


def test_a_uniform_model_has_kernels_of_its_one_decoder(sources: list[str]) -> None:
    decoder, codes = decoder_of("tcq2-3.25"), torch.zeros(1)
    expect(codes, decoder)
    for members in (1, 2, 3):
        assert kernel_of((decoder,) * members, 1) == (source_for([decoder]), (0,) * members)


def test_the_smallest_kernel_that_is_there_serves() -> None:
    a, b, c, d = sorted(map(decoder_of, ["tcq-2", "tcq-3", "tcq2-3", "vq-3"]))
    sets = DecoderSets()
    kept = [torch.zeros(1) for _ in range(3)]
    assert sets.serving([c]) == (c,)
    for tensor, decoder in zip(kept, (a, b, c), strict=True):
        expect(tensor, decoder)
    assert sets.serving([c, c]) == (c,), "it is there"
    assert sets.serving([b]) == (a, b, c), "made for all that is expected"
    assert sets.serving([c, a]) == (a, b, c)
    assert sets.serving([d, a]) == (a, b, c, d)
    assert sets.serving([c]) == (c,)
    assert len(sets.sets) == 3


def test_nothing_is_compiled_for_a_model_that_is_gone() -> None:
    codes = torch.zeros(1)
    expect(codes, decoder_of("nuq-7"))
    assert decoder_of("nuq-7") in decoder_sets._expected.values()
    del codes
    assert DecoderSets().serving([decoder_of("nuq-2")]) == (decoder_of("nuq-2"),)


def test_a_module_tells_its_backend_what_it_will_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = QuantLinear(LinearRecord("nuq-4", 32, 64, "h64", 0))
    backend = select("linear", "nuq-4", torch.device("cpu"))
    told = []
    monkeypatch.setattr(type(backend), "expect", lambda self, packed: told.append(packed))
    linear.prepare()
    (packed,) = told
    assert packed.codes is linear.qp_codes
    assert packed.layout == backend.layout
