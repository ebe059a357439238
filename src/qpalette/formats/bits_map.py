"""A picture for the model card: bits per weight by layer and kind of linear, as SVG."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape

from qpalette.codes import parse_spec
from qpalette.core.records import LinearRecord

BITS_MAP = "qpalette_bits.svg"  # beside the card, which shows it

CELL, ROW, LEFT, TOP, LETTER = 30, 20, 12, 34, 6.2  # pixels: a cell, around all, and a letter of 11 pixels
SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # of few bits to many
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def bits_map(records: Mapping[str, LinearRecord]) -> str:
    """SVG: a row for each kind, a column for each layer ("-": in none), and the bits of the codes in its cell; of
    experts the mean. Its length depends on the names alone, not on the codes, so that it can be counted beforehand.
    """
    cells = _cells(records)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells})
    least, most = min(cells.values()), max(cells.values())
    label = LEFT + int(LETTER * max(len(kind) for kind in kinds)) + 10
    width = label + CELL * max(len(layers), 8) + LEFT
    height = TOP + ROW * (len(kinds) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11" text-anchor="middle"><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-size="13" text-anchor="start">Bits per weight of the codes, by layer</text>',
    ]
    for row, kind in enumerate(kinds):
        top = TOP + ROW * row
        parts.append(f'<text x="{label - 8}" y="{top + 14}" text-anchor="end">{escape(kind)}</text>')
        for column, layer in enumerate(layers):
            if (kind, layer) in cells:
                bits = cells[kind, layer]
                parts.append(_cell(label + CELL * column, top, bits, least, most))
    bottom = TOP + ROW * len(kinds)
    for column, layer in enumerate(layers):
        name = "-" if layer < 0 else str(layer)
        parts.append(f'<text x="{label + CELL * column + CELL // 2}" y="{bottom + 14}">{name}</text>')
    parts.append(f'<text x="{label - 8}" y="{bottom + 14}" text-anchor="end">layer</text>')
    return "\n".join([*parts, "</svg>", ""])


def _cells(records: Mapping[str, LinearRecord]) -> dict[tuple[str, int], float]:
    """Bits by kind and layer, -1 for none."""
    found: dict[tuple[str, int], list[float]] = {}
    for name, record in records.items():
        layer = _LAYER.search(name)
        kind = "".join(each if each.isprintable() else "?" for each in name[layer.end() if layer else 0 :])
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", kind)
        found.setdefault((kind, int(layer[1]) if layer else -1), []).append(float(parse_spec(record.spec).rate))
    return {key: sum(bits) / len(bits) for key, bits in found.items()}


def _cell(left: int, top: int, bits: float, least: float, most: float) -> str:
    place = (bits - least) / (most - least) if most > least else 0.5
    text = "#000" if place > 0.6 else "#fff"
    return (
        f'<rect x="{left}" y="{top}" width="{CELL - 1}" height="{ROW - 1}" fill="{_color(place)}"/>'
        f'<text x="{left + CELL // 2}" y="{top + 14}" fill="{text}">{bits:.2f}</text>'
    )


def _color(place: float) -> str:
    """Of SCALE, at 0 to 1."""
    index = min(int(place * (len(SCALE) - 1)), len(SCALE) - 2)
    share = place * (len(SCALE) - 1) - index
    mixed = (round(low + share * (high - low)) for low, high in zip(SCALE[index], SCALE[index + 1], strict=True))
    return "#" + "".join(f"{each:02x}" for each in mixed)
