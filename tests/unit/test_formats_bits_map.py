"""The model card's picture: well-formed whatever the names are, with every linear's bits, of a length known before."""

from dataclasses import replace
from random import Random
from xml.etree import ElementTree

import pytest

from qpalette.core.records import LinearRecord
from qpalette.formats import bits_map

SVG = "{http://www.w3.org/2000/svg}"


def records(kinds: list[str], layers: int, *others: str) -> dict[str, LinearRecord]:
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds] + list(others)
    return {name: LinearRecord("nuq-3", 32, 32, "h32", 0) for name in names}


def texts(picture: str) -> list[str]:
    return [each.text for each in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_every_cell_has_its_bits():
    """Of experts the mean; a linear in no layer has a column of its own."""
    known = records(["mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "self_attn.q_proj"], 3, "lm_head")
    known["model.layers.1.mlp.experts.0.up_proj"] = LinearRecord("tcq-4.5", 32, 32, "h32", 0)
    known["lm_head"] = LinearRecord("nuq-6", 32, 32, "h32", 0)
    found = texts(bits_map(known))
    assert {"mlp.experts.*.up_proj", "self_attn.q_proj", "lm_head", "-", "0", "1", "2"} <= set(found)
    assert sorted(each for each in found if "." in each and each[0].isdigit()) == ["3.00"] * 5 + ["3.75", "6.00"]


def test_its_length_does_not_depend_on_the_codes():
    """`disk_bytes` counts it for a plan that is not known yet."""
    known, chooser = records(["q_proj", "k_proj"], 40, "lm_head"), Random(0)
    specs = ["nuq-2", "tcq-2.125", "tcq-3.25", "vq-4", "nuq-8"]
    lengths = {
        len(bits_map({name: replace(record, spec=chooser.choice(specs)) for name, record in known.items()}))
        for _ in range(20)
    }
    assert lengths == {len(bits_map(known))}


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a"b', "a&b", "bell\x07", "half \udc80", "5"])
def test_no_name_breaks_it(name):
    picture = bits_map(records([name], 2))
    picture.encode()
    assert not list(ElementTree.fromstring(picture).iter(f"{SVG}script"))
