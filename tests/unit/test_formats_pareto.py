"""The model card's picture of predicted losses: right where it is drawn, and of a length known before."""

from dataclasses import replace
from random import Random
from xml.etree import ElementTree

import pytest

from qpalette.codes import parse_spec
from qpalette.core.records import LinearRecord
from qpalette.formats import model_card, pareto, total_bits
from qpalette.formats.pareto import FEWEST, LEFT, MOST, ONE_CODE, OURS, PARETO, RIGHT, WIDTH

SVG = "{http://www.w3.org/2000/svg}"
NAMES = [f"model.layers.{layer}.{kind}" for layer in range(6) for kind in ("q_proj", "up_proj")]
RECORDS = {name: LinearRecord("tcq-3", 64, 128, "h128", 0) for name in NAMES}


def circles(picture: str) -> list[tuple[float, float, str]]:
    found = ElementTree.fromstring(picture).iter(f"{SVG}circle")
    return [(float(each.get("cx")), float(each.get("cy")), each.get("fill")) for each in found]


def bound(picture: str) -> list[tuple[float, float]]:
    line = next(ElementTree.fromstring(picture).iter(f"{SVG}polyline"))
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def bits_at(x: float) -> float:
    return FEWEST + (MOST - FEWEST) * (x - LEFT) / (WIDTH - LEFT - RIGHT)


def test_one_code_for_all_lies_on_its_own_points():
    """A model that is one of them has their loss, at a few more bits: its scales and signs."""
    picture = pareto(RECORDS, dict.fromkeys(NAMES, 2.0))
    *others, (x, y, color) = circles(picture)
    rate = total_bits(RECORDS.values()).total / (len(NAMES) * 64 * 128)
    assert color == OURS and bits_at(x) == pytest.approx(rate, abs=0.01)  # noqa: PT018 - one point
    assert y == others[ONE_CODE.index("tcq-3")][1]
    assert [bits_at(each[0]) for each in others] == pytest.approx(
        [float(parse_spec(n).rate) for n in ONE_CODE], abs=0.01
    )


def test_nothing_is_below_the_bound():
    chooser = Random(1)
    for _ in range(10):
        known = {name: chooser.lognormvariate(0, 3) for name in NAMES}
        specs = {
            name: replace(RECORDS[name], spec=chooser.choice(["tcq-2", "nuq-4", "vq-3", "tcq-5"])) for name in NAMES
        }
        picture = pareto(specs, known)
        line = bound(picture)
        for x, y, _ in circles(picture):
            right = min(point for point in line if point[0] >= x - 0.1)
            assert y <= right[1] + 0.1, "higher up is more loss"


def test_its_length_does_not_depend_on_codes_or_values():
    """`disk_bytes` counts it for a plan that is not known yet."""
    chooser = Random(0)
    specs = ["nuq-2", "tcq-2.125", "tcq-3.25", "vq-4", "nuq-8"]
    lengths = set()
    for power in (-20, -3, 0, 2, 5, 20):
        known = {name: 10.0**power * chooser.lognormvariate(0, 2) for name in NAMES}
        chosen = {name: replace(record, spec=chooser.choice(specs)) for name, record in RECORDS.items()}
        lengths.add(len(pareto(chosen, known).encode()))
    assert len(lengths) == 1


@pytest.mark.parametrize("known", [{}, {NAMES[0]: 1.0}, dict.fromkeys(NAMES, 0.0)], ids=["none", "one", "nothing lost"])
def test_no_picture_of_what_is_not_known(known):
    assert pareto(RECORDS, known) is None


@pytest.mark.parametrize("has", [True, False])
def test_the_card_shows_what_lies_beside_it(has):
    distortions = dict.fromkeys(NAMES, 0.02)
    assert (PARETO in model_card("m", {"model_type": "llama"}, RECORDS, distortions, 0, has_pareto=has)) == has
