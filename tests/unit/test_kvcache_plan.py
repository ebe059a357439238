"""What --cache takes, and the file of a plan."""

from fractions import Fraction

import pytest

from qpalette.core.errors import SpecError
from qpalette.kvcache import CachePlan, Exact, parse_cache, read_cache_plan

SHAPES = [(3, 64, 64)] * 4


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("vq-3", CachePlan(("vq-3",), ("vq-3",))),
        ("vq-3.0/nuq-4", CachePlan(("vq-3",), ("nuq-4",))),
        ("white:nuq-4", CachePlan(("nuq-4",), ("nuq-4",), "white")),
        ("mean:vq4-1.5,sinks=8,window=32", CachePlan(("vq4-1.5",), ("vq4-1.5",), "mean", Exact(8, 32))),
        ("balanced:vq-2,window=3", CachePlan(("vq-2",), ("vq-2",), "balanced", Exact(4, 3))),
    ],
)
def test_a_text_is_a_plan_and_back(text, plan):
    assert parse_cache(text) == plan
    assert parse_cache(str(plan)) == plan
    assert CachePlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "text", ["", "tcq-3", "vq-9", "vq-3,", "vq-3,sinks", "vq-3,sinks=-1", "vq-3,rank=2", "odd:vq-3", "vq-3/", "/vq-3/x"]
)
def test_what_means_nothing_is_told(text):
    if text == "vq-3/":
        assert parse_cache(text) == parse_cache("vq-3")  # no code of values: that of keys
        return
    with pytest.raises(SpecError):
        parse_cache(text)


def test_bits_are_those_of_all_layers():
    assert parse_cache("vq-3").bits(SHAPES) == 3.125
    mixed = CachePlan(("vq-3", "vq-2", "vq-3", "vq-2"), ("vq-2.5",))
    assert mixed.bits(SHAPES) == 2.5 + 0.125
    stored = 128 * 2.5 + 8 + 64 * 2.5 + 8
    assert mixed.bits([(1, 128, 64)] * 4) == Fraction(stored) / 192


def test_a_plan_of_another_model_is_told():
    with pytest.raises(SpecError, match="has 2 layers, and this model 4"):
        CachePlan(("vq-3", "vq-2"), ("vq-3",)).bits(SHAPES)


@pytest.mark.parametrize(
    "change",
    [
        {"cache_plan_version": 2},
        {"cache_plan_version": True},
        {"keys": "vq-3"},
        {"keys": [3]},
        {"keys": []},
        {"transform": None},
        {"sinks": 1.5},
        {"sinks": True},
        {"window": -1},
        {"more": 1},
    ],
)
def test_a_file_that_is_no_plan_is_told(tmp_path, change):
    import json

    content = json.loads(parse_cache("vq-3").to_json()) | change
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(content))
    with pytest.raises(SpecError, match=str(file)):
        read_cache_plan(file)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(SpecError, match="does not exist"):
        parse_cache(str(tmp_path / "none.json"))
