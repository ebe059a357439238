"""Prompts as int8: the definition, who has it, and what the CUDA kernels take for granted of it.

Bounds. A token's numbers are rounded to steps of its largest value / 127, by at most half of one: errors are even over
a step, so that of a product is step / sqrt(12) times the norm of the row, in the root mean square over many results;
the same holds of the row with the token's norm. Both together, and their product, which is smaller than either:

    error^2 <= (steps of tokens^2 |W|^2 + steps of weights^2 |x|^2) / 12 (1 + 1/127)

in the sum over all results, where steps and norms are those of the tokens and rows. 1.1 times that is allowed.
"""

from __future__ import annotations

import pytest
import torch

from qpalette.backends.cuda.decoder import decoder_spec, entries
from qpalette.backends.cuda.int8 import MOST_SUMS, pieces
from qpalette.cli import main
from qpalette.codes import parse_spec
from qpalette.core.environment import PREFILL
from qpalette.core.errors import InputError, UnsupportedError
from qpalette.core.records import LinearRecord
from qpalette.nn import QuantLinear
from qpalette.rotate import Rotation, diagonal_of
from qpalette.runtime import INT8, PackedLinear, prefill_by, prefill_road, select
from qpalette.runtime.prefill import (
    FEW_TOKENS,
    FLOAT,
    LARGEST,
    MOST_INPUTS,
    product_in_int8,
    road_of,
    table_step,
    tokens_in_int8,
    weights_in_int8,
)
from random_packed import REF, generator, random_linear

SPECS = ["tcq-3.25", "tcq2-3.25", "vq-3", "nuq-4"]


@pytest.fixture
def in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFILL, INT8)


def vectors(tokens: int, columns: int) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=generator(5))


def rotated(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    rotation = Rotation.parse(packed.rotation, packed.in_features)
    return rotation.apply(x.double() * diagonal_of(packed.diagonal, packed.in_features))


@pytest.mark.usefixtures("in_int8")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(48, 576), (100, 250), (33, 2048)], ids=str)
def test_the_error_is_that_of_steps(spec: str, shape: tuple[int, int]) -> None:
    rows, columns = shape
    packed, x = random_linear(spec, rows, columns), vectors(200, columns)
    exact_tokens, weight = rotated(x, packed), REF.rotated_weight(packed).double()
    wanted = exact_tokens @ weight.T
    of_tokens = exact_tokens.abs().amax(1) / LARGEST
    of_weights = table_step(spec) * packed.scales.view(torch.float16).double()
    parts = of_tokens.square().sum() * weight.square().sum() + of_weights.square().sum() * exact_tokens.square().sum()
    bound = float((parts / 12 * (1 + 1 / LARGEST)).sqrt())
    error = float((REF.linear(x, packed).double() - wanted).norm())
    assert error <= 1.1 * bound
    assert error > 0.5 * bound, "this was no int8"


def test_numbers_that_are_whole_already_are_multiplied_exactly() -> None:
    tokens = torch.randint(-LARGEST, LARGEST + 1, (150, 64), generator=generator()).float()
    tokens[:, 0] = LARGEST
    whole = tokens_in_int8(tokens * 2.0**-9)
    assert torch.equal(whole.numbers.float(), tokens)
    assert torch.equal(whole.steps, torch.full((150, 1), 2.0**-9))
    weights = weights_in_int8(parse_spec("nuq-4").entries()[:, 0][torch.randint(16, (32, 64))], "nuq-4")
    scales = torch.tensor([0.5, 2.0]).repeat(16)
    wanted = tokens.double() @ weights.numbers.double().T * scales * 2.0**-9
    found = product_in_int8(whole, weights._replace(steps=torch.ones(())), scales)
    assert torch.equal(found.double(), wanted)


def test_tokens_of_any_size_and_none() -> None:
    x = vectors(4, 256) * torch.tensor([1e-30, 1.0, 1e30, 0.0])[:, None]
    whole = tokens_in_int8(x)
    assert whole.numbers.abs().amax(1).tolist() == [LARGEST, LARGEST, LARGEST, 0]
    assert ((whole.numbers * whole.steps - x).abs() <= 0.501 * whole.steps).all()  # and float32's own rounding


@pytest.mark.usefixtures("in_int8")
@pytest.mark.parametrize("tokens", [1, FEW_TOKENS])
def test_a_few_tokens_are_multiplied_as_ever(tokens: int) -> None:
    packed, x = random_linear("nuq-4", 32, 64), vectors(tokens, 64)
    found = REF.linear(x, packed)
    with prefill_by(FLOAT):
        assert torch.equal(found, REF.linear(x, packed))


def test_it_is_asked_for_and_only_in_the_meantime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PREFILL, raising=False)
    assert road_of(1000, 64) == FLOAT
    with prefill_by(INT8):
        assert (road_of(1000, 64), road_of(FEW_TOKENS, 64)) == (INT8, FLOAT)
        with prefill_by(None):
            assert prefill_road() == INT8
    assert prefill_road() == FLOAT
    monkeypatch.setenv(PREFILL, "int4")
    with pytest.raises(InputError, match=r"'int4' is no way to multiply prompts .*: choose float or int8"):
        prefill_road()


@pytest.mark.usefixtures("in_int8")
def test_no_sum_leaves_int32(caplog: pytest.LogCaptureFixture) -> None:
    assert MOST_INPUTS * LARGEST**2 < 2**31
    assert [road_of(1000, MOST_INPUTS + extra) for extra in (0, 1, 1)] == [INT8, FLOAT, FLOAT]
    assert len(caplog.records) == 1, "said once"


@pytest.mark.usefixtures("in_int8")
def test_a_backend_without_it_refuses_by_name() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UnsupportedError, match="backend 'cpu' has no int8 for prompts"):
        select("linear", "nuq-4", cpu)
    linear = QuantLinear(LinearRecord("nuq-4", 32, 64, "h64", 0))
    with pytest.raises(UnsupportedError, match="leave out --prefill"):
        linear.prepare()
    assert select("encode", "nuq-4", cpu).name == "cpu"
    assert select("linear", "nuq-4", cpu, "ref").name == "ref"


def test_the_commands_refuse_what_is_no_road(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv(PREFILL, FLOAT)  # what a command sets is gone behind this test
    model = "fixture"
    for command in (["generate", model, "x"], ["chat", model], ["serve", model], ["eval", model], ["bench", model]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--prefill", "int4"])
        assert stopped.value.code == 1
        assert "choose float or int8" in capsys.readouterr().err


@pytest.mark.parametrize("spec", [*SPECS, "nuq-8", "vq-1.5", "tcq-8"])
def test_tables_of_bytes_are_those_of_the_definition(spec: str) -> None:
    """In the place of each float16, in the low byte of its half."""
    decoder = decoder_spec(spec)
    assert decoder is not None
    values = entries(spec, torch.device("cpu")).view(torch.float16).reshape(-1, 2)[:, : decoder.values]
    halves = entries(spec, torch.device("cpu"), in_int8=True).view(torch.int16).reshape(-1, 2)
    assert not (halves & ~0xFF).any()
    found = halves.to(torch.uint8).view(torch.int8)[:, : decoder.values].float()
    assert found.abs().max() == LARGEST
    # What float16 has rounded may be half of its own unit further from a whole number than the definition's.
    assert ((values.float() / table_step(spec) - found).abs() <= 0.5 + LARGEST * 2.0**-11).all()


def test_pieces_are_whole_tiles_that_are_all_rows() -> None:
    for rows, tokens in ((16, 129), (1008, 1024), (4096, 1024), (14336, 1024), (14336, 4096), (48, 1 << 20)):
        cut = list(pieces(rows, tokens))
        assert [row for first, end in cut for row in range(first, end)] == list(range(rows))
        assert all((end - first) % 16 == 0 for first, end in cut)
        assert all((end - first) * tokens <= MOST_SUMS or end - first == 16 for first, end in cut)
