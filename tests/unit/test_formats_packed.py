"""`quantization_config`: what is right survives a round trip, each thing that is wrong has its own message."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from qpalette.core.errors import ArtifactError
from qpalette.core.records import FLOAT16, LinearRecord
from qpalette.formats import QuantizationFormat, counted_bits, expected_tensors

RECORD = LinearRecord("tcq-3.25", 100, 72, "h36xh2", 7, "model.layers.0.mlp.gate_up_proj")
NAME = "model.layers.0.mlp.up_proj"


def good() -> dict:
    return QuantizationFormat.of({NAME: RECORD}, {"qpalette": "0.1.0"}, ["lm_head"]).to_dict()


def test_round_trip_through_json():
    parsed = QuantizationFormat.parse(json.loads(json.dumps(good())))
    assert parsed.records == {NAME: RECORD}
    assert parsed.to_dict() == good()
    entry = {"spec": "tcq-3.25", "shape": [100, 72], "rotation": "h36xh2", "seed": 7, "group": RECORD.group}
    assert good()["linears"][NAME] == entry


def test_a_linear_of_no_group_is_alone():
    alone = QuantizationFormat.of({NAME: replace(RECORD, group="")})
    assert alone.records[NAME].group == NAME


def test_a_diagonal_in_place_of_signs():
    record = replace(RECORD, diagonal=FLOAT16)
    written = QuantizationFormat.of({NAME: record})
    assert written.records == {NAME: record}
    assert written.to_dict()["linears"][NAME]["diagonal"] == "float16"
    assert expected_tensors(record).keys() == {"qp_codes", "qp_scales", "qp_diagonal"}
    assert counted_bits(record).total - counted_bits(RECORD).total == 16 * 72 - 8 * 9


def test_tensors_of_a_linear_and_their_counted_bits():
    tensors = expected_tensors(RECORD)
    assert tensors == {
        "qp_codes": (torch.int32, (7, 5, 26)),
        "qp_scales": (torch.int16, (100,)),
        "qp_signs": (torch.uint8, (9,)),
    }
    stored = sum(8 * torch.empty(shape, dtype=dtype).nbytes for dtype, shape in tensors.values())
    assert stored == counted_bits(RECORD).total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"format_version": 4}, "format_version is 4, and this release reads 1, 2, 3; upgrade"),
        ({"format_version": True}, "format_version is True"),
        ({"format_version": None}, "format_version is None"),
        ({"extra": 1}, "extra: Extra inputs"),
        ({"linears": {}}, "at least 1 item"),
        ({"linears": [1]}, "linears: Input should be a valid dictionary"),
        ({"modules_to_not_convert": [3]}, "modules_to_not_convert.0"),
        ({"provenance": {"a": 1}}, "provenance.a"),
    ],
)
def test_wrong_fields(change, message):
    with pytest.raises(ArtifactError, match=message):
        QuantizationFormat.parse({**good(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": "tcq-3.3"}, "multiples of 0.125"),
        ({"spec": "tcq-3.250"}, "not canonical; write 'tcq-3.25'"),
        ({"spec": "gold-4"}, "not a quantizer"),
        ({"spec": "nuq-" + "9" * 5000}, "at most 200 characters"),
        ({"shape": [100]}, "at least 2 items"),
        ({"shape": [100, 72, 1]}, "at most 2 items"),
        ({"shape": [0, 72]}, "greater than or equal to 1"),
        ({"shape": [100.0, 72]}, "valid integer"),
        ({"shape": [True, 72]}, "valid integer"),
        ({"shape": [1 << 34, 72]}, "beyond 2\\^40"),
        ({"shape": [1 << 62, 72]}, "less than"),
        ({"rotation": "h64"}, "do not divide 72"),
        ({"rotation": "../x"}, "not a rotation"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": "0"}, "valid integer"),
        ({"colour": 1}, "Extra inputs"),
    ],
)
def test_wrong_linears_are_named(change, message):
    data = copy.deepcopy(good())
    data["linears"][NAME].update(change)
    with pytest.raises(ArtifactError, match=message) as error:
        QuantizationFormat.parse(data)
    assert NAME in str(error.value)


@pytest.mark.parametrize("data", [[], None, "qpalette", {}])
def test_no_config_at_all(data):
    with pytest.raises(ArtifactError, match="quantization_config"):
        QuantizationFormat.parse(data)
