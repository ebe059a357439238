"""Plans: exact arithmetic, a hard budget, canonical text."""

import json
from fractions import Fraction

import pytest

from qpalette.codes import parse_spec
from qpalette.core.errors import SpecError
from qpalette.core.records import LinearGroup, LinearShape
from qpalette.formats import packed_bits
from qpalette.plan import Plan, counted_rate, palette_of, spec_for_bits, summarize, uniform_plan

PALETTE = palette_of()
GROUPS = (
    LinearGroup("g.qk", (LinearShape("g.q", 256, 192), LinearShape("g.k", 72, 192))),
    LinearGroup("g.o", (LinearShape("g.o", 192, 250),)),
)


def test_uniform_plan_names_every_linear():
    plan = uniform_plan(GROUPS, "tcq-3.25", seed=5)
    assert plan.specs == {"g.q": "tcq-3.25", "g.k": "tcq-3.25", "g.o": "tcq-3.25"}
    assert (plan.rotation, plan.seed, plan.effort) == ("full", 5, "standard")


def test_summary_counts_scales_signs_and_padding():
    summary = summarize(uniform_plan(GROUPS, "tcq-3"), GROUPS)
    codes = 3 * 256 * (16 * 12 + 5 * 12 + 12 * 16)  # 72 rows and 250 columns are padded
    total = codes + 16 * (256 + 72 + 192) + 192 + 192 + 256
    assert summary.bits.total == total
    assert summary.rate == Fraction(total, 256 * 192 + 72 * 192 + 192 * 250)
    assert summary.bytes == total // 8
    assert summary.specs == {"tcq-3": summary.weights}
    assert summary.distortion["g.q"] == parse_spec("tcq-3").claimed_distortion


def test_mixed_specs_are_summed_one_by_one():
    plan = Plan({"g.q": "nuq-4", "g.o": "tcq-2"})
    summary = summarize(plan, GROUPS)
    parts = [packed_bits(Fraction(4), 256, 192), packed_bits(Fraction(2), 192, 250)]
    assert summary.bits.total == sum(part.total for part in parts)
    assert summary.specs == {"nuq-4": 256 * 192, "tcq-2": 192 * 250}
    assert summary.linears == 2


@pytest.mark.parametrize("bits", ["1.5", "2", "3.3", "4", "7.9", "8", "12"])
def test_budget_is_hard_and_used_up(bits):
    quantizer = parse_spec(spec_for_bits(GROUPS, bits, PALETTE))
    assert counted_rate(GROUPS, quantizer.rate) <= Fraction(bits)
    assert quantizer.rate == 8 or counted_rate(GROUPS, quantizer.rate + Fraction(1, 8)) > Fraction(bits)


def test_a_large_model_of_4_bits_gets_3_875():
    big = (LinearGroup("a", (LinearShape("a", 4096, 4096),)),)
    assert spec_for_bits(big, "4", PALETTE) == "tcq-3.875"
    assert spec_for_bits(big, counted_rate(big, Fraction(4)), PALETTE) == "tcq-4"
    assert spec_for_bits(big, "4", palette_of("best")) == "tcq-3.875-L18"


def test_least_budget_is_named_and_works():
    with pytest.raises(SpecError, match="the least is") as error:
        spec_for_bits(GROUPS, "1", PALETTE)
    least = str(error.value).split("the least is ")[1].split(",")[0]
    assert spec_for_bits(GROUPS, least, PALETTE) == "tcq-1"


def test_wrong_requests():
    with pytest.raises(SpecError, match="choose fast, standard, best"):
        palette_of("huge")
    with pytest.raises(SpecError, match="not a rate"):
        spec_for_bits(GROUPS, "four", PALETTE)
    with pytest.raises(SpecError, match="no linear to quantize"):
        spec_for_bits((), "4", PALETTE)
    with pytest.raises(SpecError, match="no linear"):
        uniform_plan((), "tcq-4")
    with pytest.raises(SpecError, match="names 'nope'"):
        summarize(Plan({"nope": "tcq-4"}), GROUPS)
    with pytest.raises(SpecError, match="not a quantizer"):
        Plan({"g.q": "tcq-9"})
    with pytest.raises(SpecError, match="seed"):
        Plan({"g.q": "tcq-4"}, seed=-1)


def test_text_comes_back_and_the_digest_is_stable():
    plan = Plan({"b": "tcq-4.0", "a": "nuq-4"}, "block-64", 3)
    same = Plan({"a": "nuq-4", "b": "tcq-4"}, "block-64", 3)
    assert plan == same
    assert plan.digest == same.digest
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan({"a": "nuq-4", "b": "tcq-4"}, "block-64", 4).digest != plan.digest


@pytest.mark.parametrize(
    "change",
    [
        {"plan_version": 1},
        {"plan_version": True},
        {"linears": []},
        {"linears": {}},
        {"linears": {"a": "tcq-4"}},
        {"linears": {"a": {"spec": 4}}},
        {"linears": {"a": {"spec": "tcq-9"}}},
        {"linears": {"a": {"spec": "tcq-4", "sensitivity": -1}}},
        {"linears": {"a": {"spec": "tcq-4", "sensitivity": float("nan")}}},
        {"linears": {"a": {"spec": "tcq-4", "bits": 4}}},
        {"launches": [["b"]]},
        {"launches": "a"},
        {"prediction": 1},
        {"rotation": 1},
        {"x": 1},
        {"seed": 1.5},
    ],
)
def test_texts_that_are_no_plan(change):
    content = json.loads(Plan({"a": "nuq-4"}).to_json())
    with pytest.raises(SpecError):
        Plan.from_json(json.dumps({**content, **change}))
    with pytest.raises(SpecError, match="JSON"):
        Plan.from_json("{")


@pytest.mark.parametrize(
    ("specs", "effort"),
    [
        (["tcq-4", "nuq-4"], "standard"),
        (["nuq-4"], "standard"),
        (["tcq-4-L12"], "fast"),
        (["tcq-4-L18", "tcq-2-L18"], "best"),
        (["tcq-4-L18", "tcq-2"], "mixed"),
    ],
)
def test_effort_is_what_the_specs_say(specs, effort):
    assert Plan({str(i): spec for i, spec in enumerate(specs)}).effort == effort


def test_a_plan_file_keeps_what_the_planner_knew_until_it_is_edited():
    plan = Plan(
        {"a": "tcq-3", "b": "nuq-4"},
        sensitivities={"a": 2.0, "b": 0.5},
        prediction={
            "predicted_loss": 2 * parse_spec("tcq-3").claimed_distortion + parse_spec("nuq-4").claimed_distortion / 2
        },
        provenance={"budget": "3 bits per weight"},
        launches=(("a", "b"),),
    )
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert plan.predicted_loss == pytest.approx(plan.prediction["predicted_loss"])
    assert plan.digest == Plan({"b": "nuq-4", "a": "tcq-3"}).digest, "what a planner knew changes no stored byte"
    edited = Plan.from_json(text.replace('"tcq-3"', '"tcq-2"'))
    assert edited.prediction == {}
    assert edited.predicted_loss > plan.predicted_loss
    assert Plan({"a": "tcq-3"}).predicted_loss is None
    assert text.count("\n") == len(text.splitlines()) > len(plan.specs), "one line per linear: made to be compared"


def test_plan_files_that_cannot_be_read_are_named(tmp_path):
    file = tmp_path / "plan.json"
    with pytest.raises(SpecError, match="does not exist"):
        Plan.read(file)
    file.write_text("{}")
    with pytest.raises(SpecError, match=str(file)):
        Plan.read(file)
    file.write_bytes(b"\xff")
    with pytest.raises(SpecError, match="cannot be read"):
        Plan.read(file)
