"""The packed layer: equal to its dequantized self, and its tensors survive whatever is done to a module."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn

from qpalette.codes import parse_spec
from qpalette.codes.tiles import from_tiles, to_tiles
from qpalette.core.errors import ArtifactError, SpecError, UnsupportedError
from qpalette.core.records import LinearRecord
from qpalette.nn import QuantLinear
from qpalette.rotate import pack_signs, random_signs, rotate_weight, rotation_for, unrotate_weight
from qpalette.runtime import select
from tolerance import check_float32, float32_error

SPECS = ["nuq-4", "tcq-2-L12"]
SHAPES = [(96, 64), (40, 36)]  # whole tiles, and tiles with padding
BUFFERS = ("qp_codes", "qp_scales", "qp_signs")
CPU = torch.device("cpu")


def packed_layer(spec: str = "nuq-4", shape: tuple[int, int] = (40, 36), bias: bool = True, dtype=torch.float32):
    """A loaded layer, its stored tensors, and the weight they mean by the plain definitions."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    rotation, signs = rotation_for(shape[1], "full"), random_signs(shape[1], 0, "layer")
    rotated = rotate_weight(weight, rotation, signs)
    scales = rotated.square().mean(1).sqrt().half()
    tiles = to_tiles(rotated / scales.float()[:, None])
    codes = select("encode", spec, CPU).encode(spec, tiles.flatten(0, 1))
    stored = {
        "qp_codes": codes.reshape(*tiles.shape[:2], -1),
        "qp_scales": scales.view(torch.int16),
        "qp_signs": pack_signs(signs),
    }
    if bias:
        stored["bias"] = torch.randn(shape[0], dtype=dtype)
    layer = QuantLinear(LinearRecord(spec, *shape, rotation.name, 0), bias=bias, dtype=dtype)
    layer.load_state_dict(stored)
    decoded = from_tiles(parse_spec(spec).decode(codes).reshape(tiles.shape), *shape)
    return layer, stored, unrotate_weight(decoded * scales.float()[:, None], rotation, signs)


def assert_stored(layer: QuantLinear, stored: dict[str, torch.Tensor]) -> None:
    state = layer.state_dict()
    assert state.keys() == stored.keys()
    for name in BUFFERS:
        assert state[name].dtype == stored[name].dtype
        assert torch.equal(state[name], stored[name])


def linear(bias: torch.Tensor | None = None):
    """x, W -> x W^T + bias in float64."""
    return lambda x, weight: nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


def terms(columns: int) -> int:
    """Roundings: the product, the rotation of x, the inverse one that gave the weight; scale, bias and result."""
    return columns + 2 * sum(factor.order for factor in rotation_for(columns, "full").factors) + 3


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
def test_output_is_that_of_the_dequantized_weight(spec, shape, prepare):
    layer, stored, weight = packed_layer(spec, shape)
    if prepare:
        layer.prepare()
    x = torch.randn(2, 3, shape[1])
    check_float32(layer(x), linear(stored["bias"]), (x, weight), terms(shape[1]))


@pytest.mark.parametrize("rows", [1, 17, 40])
def test_any_number_of_inputs(rows):
    layer, stored, weight = packed_layer()
    layer.prepare()
    x = torch.randn(rows, 36)
    result = layer(x)
    assert result.shape == (rows, 40)
    check_float32(result, linear(stored["bias"]), (x, weight), terms(36))
    assert layer(x[:0]).shape == (0, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_inputs_type(dtype):
    layer, _, weight = packed_layer("nuq-6", bias=False)  # not multiplied in bytes on any processor
    layer.prepare()
    x = torch.randn(3, 36).to(dtype)
    result = layer(x)
    assert result.dtype == dtype
    if dtype == torch.float32:
        return check_float32(result, linear(), (x, weight), terms(36))
    wanted, rounded = linear()(x, weight), linear()(x, weight.to(dtype))
    # One rounding of the result: below 17 rows the kernels compute in float32.
    size = wanted.square().mean().sqrt()
    bound = torch.finfo(dtype).eps / 2 * wanted.abs() + 2 * float32_error(terms(36)) * size
    assert ((result.double() - wanted).abs() <= bound).all()
    assert not ((rounded - wanted).abs() <= bound).all(), "weights rounded to the type pass"


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dequantize_is_exact(bias, prepare):
    layer, stored, weight = packed_layer(bias=bias)
    if prepare:
        layer.prepare()
    linear = layer.dequantize(torch.bfloat16)
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, weight.bfloat16())
    assert (linear.bias is not None) == bias
    if bias:
        assert torch.equal(linear.bias, stored["bias"].bfloat16())
        assert linear.bias.data_ptr() != layer.bias.data_ptr()
    assert torch.equal(layer.dequantize(torch.float32).weight, weight)


def test_prepare_changes_the_layout_in_memory_only(monkeypatch):
    layer, stored, _ = packed_layer()
    layer.prepare()
    assert layer.layout == select("linear", "nuq-4", CPU).layout != "tiles"
    assert_stored(layer, stored)
    layer.prepare()  # again: nothing changes
    assert_stored(layer, stored)
    monkeypatch.setenv("QPALETTE_BACKEND", "ref")
    layer.prepare()
    assert layer.layout == "tiles"
    assert torch.equal(layer.qp_codes, stored["qp_codes"])


def test_a_prepared_layer_loads_the_stored_layout():
    layer, stored, _ = packed_layer()
    layer.prepare()
    other = {name: tensor.flip(0) if name == "qp_codes" else tensor for name, tensor in stored.items()}
    layer.load_state_dict(other)
    assert layer.prepared
    assert_stored(layer, other)


@pytest.mark.parametrize(
    "change",
    [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.bfloat16), lambda m: m.cpu()],
    ids=["half", "bfloat16", "double", "to", "cpu"],
)
def test_casts_touch_the_bias_alone(change):
    layer, stored, _ = packed_layer()
    layer.prepare()
    changed = change(layer)
    assert changed is layer
    assert layer.prepared
    assert_stored(layer, stored)
    assert torch.equal(layer.bias, stored["bias"].to(layer.bias.dtype))


def test_a_move_goes_through_the_stored_layout():
    layer, stored, _ = packed_layer()
    layer.prepare()
    layer.to("meta")
    assert layer.layout == "tiles"
    assert layer.qp_codes.shape == stored["qp_codes"].shape


def test_copies_are_independent():
    layer, stored, _ = packed_layer()
    layer.prepare()
    twin = copy.deepcopy(layer)
    layer.qp_codes.zero_()
    assert_stored(twin, stored)


def test_on_meta_the_shapes_are_exact_and_prepare_waits():
    record = LinearRecord("tcq-3.25", 40, 36, "h36", 0)
    layer = QuantLinear(record, bias=True, dtype=torch.bfloat16, device="meta")
    layer.prepare()
    assert not layer.prepared
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "qp_codes": (3, 3, 26),
        "qp_scales": (40,),
        "qp_signs": (5,),
        "bias": (40,),
    }
    assert layer.bias.dtype == torch.bfloat16


def test_the_repr_counts_every_bit():
    layer = QuantLinear(LinearRecord("nuq-4", 64, 64, "h64", 0))
    assert "nuq-4" in repr(layer)
    assert "h64" in repr(layer)
    assert f"bits={4 + 16 / 64 + 1 / 64:.4g}" in repr(layer)


@pytest.mark.parametrize(("name", "dtype"), [("qp_codes", torch.float32), ("qp_scales", torch.float16)])
def test_a_buffer_of_another_type_is_refused(name, dtype):
    layer, _, _ = packed_layer()
    setattr(layer, name, layer.get_buffer(name).to(dtype))
    with pytest.raises(ArtifactError, match=name):
        layer.prepare()


@pytest.mark.parametrize(("spec", "rotation"), [("nuq-99", "h36"), ("nuq-4", "h35")])
def test_a_record_that_means_nothing_is_refused(spec, rotation):
    with pytest.raises(SpecError):
        QuantLinear(LinearRecord(spec, 40, 36, rotation, 0))


def test_an_unknown_backend_is_refused_by_name(monkeypatch):
    layer, _, _ = packed_layer()
    monkeypatch.setenv("QPALETTE_BACKEND", "abacus")
    with pytest.raises(UnsupportedError, match="abacus"):
        layer.prepare()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("prepare", [False, True])
def test_compiles_into_one_graph(prepare, mode):
    layer, _, _ = packed_layer("tcq-2-L12")
    if prepare:
        layer.prepare()
    x = torch.randn(1, 36)
    with mode():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_compiles_with_inductor():
    layer, stored, weight = packed_layer()
    layer.prepare()
    x = torch.randn(1, 36)
    with torch.inference_mode():
        result = torch.compile(layer, fullgraph=True)(x)
    check_float32(result, linear(stored["bias"]), (x, weight), terms(36))
