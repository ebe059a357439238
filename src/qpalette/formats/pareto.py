"""A picture for the model card: what the plan predicts to lose, beside one code for all and the bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qpalette.codes import parse_spec
from qpalette.core.records import LinearRecord
from qpalette.formats.parts import total_bits
from qpalette.theory import reverse_water_filling

PARETO = "qpalette_pareto.svg"  # beside the card, which shows it

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 300, 70, 16, 34, 42  # pixels: in all, and around the axes
FEWEST, MOST, PARTS = 1.0, 6.0, 20  # bits per weight, and the bound's pieces between them
ONE_CODE = ("tcq-1.5", "tcq-2", "tcq-2.5", "tcq-3", "tcq-3.5", "tcq-4", "tcq-5", "tcq-6")
TICKS = 4  # intervals of the loss
OURS, OTHERS, BOUND = "#c2410c", "#0b62a4", "#111"

Point = tuple[float, float]  # bits per weight, predicted loss


def pareto(records: Mapping[str, LinearRecord], sensitivities: Mapping[str, float]) -> str | None:
    """SVG of predicted losses, sums of sensitivity times distortion, or None where the plan does not know them all.

    Its length does not depend on the codes or on the values, so that it can be counted beforehand.
    """
    if not records.keys() <= sensitivities.keys() or not any(sensitivities[name] > 0 for name in records):
        return None
    known = [sensitivities[name] for name in records]
    weights = [float(record.out_features * record.in_features) for record in records.values()]
    rates = [FEWEST + (MOST - FEWEST) * part / PARTS for part in range(PARTS + 1)]
    bound = [(rate, reverse_water_filling(known, weights, rate * sum(weights)).predicted_loss) for rate in rates]
    codes = [parse_spec(spec) for spec in ONE_CODE]
    one_code = [(float(code.rate), sum(known) * code.claimed_distortion) for code in codes]
    distortions = [parse_spec(record.spec).claimed_distortion for record in records.values()]
    lost = sum(each * distortion for each, distortion in zip(known, distortions, strict=True))
    return _drawn(bound, one_code, (total_bits(records.values()).total / sum(weights), lost))


def _drawn(bound: Sequence[Point], one_code: Sequence[Point], ours: Point) -> str:
    losses = [math.log10(loss) for _, loss in (*bound, *one_code, ours)]
    low, high = min(losses), max(losses)

    def place(point: Point) -> str:
        across = min(max((point[0] - FEWEST) / (MOST - FEWEST), 0.0), 1.0)
        down = (high - math.log10(point[1])) / (high - low)
        x, y = LEFT + across * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)
        return f"{x:05.1f},{y:05.1f}"

    def circle(point: Point, radius: int, color: str) -> str:
        x, y = place(point).split(",")
        return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{color}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11" text-anchor="middle"><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-size="13" text-anchor="start">Predicted loss, by bits per weight</text>',
    ]
    for tick in range(TICKS + 1):
        loss = 10 ** (low + (high - low) * tick / TICKS)
        x, y = place((FEWEST, loss)).split(",")
        parts.append(f'<line x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#e6e6e6"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy="4" text-anchor="end">{_padded(loss)}</text>')
    for rate in range(int(FEWEST), int(MOST) + 1):
        x = place((rate, 10**low)).partition(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}">{rate}</text>')
    line = " ".join(map(place, bound))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{BOUND}"/>')
    parts += [circle(point, 3, OTHERS) for point in one_code]
    parts.append(circle(ours, 5, OURS))
    legend = (("this model", OURS), ("one trellis code for all", OTHERS), ("bound (reverse water-filling)", BOUND))
    parts += [
        f'<text x="{WIDTH - RIGHT}" y="{TOP + 12 + 16 * row}" text-anchor="end" fill="{color}">{name}</text>'
        for row, (name, color) in enumerate(legend)
    ]
    parts.append(f'<text x="{WIDTH // 2}" y="{HEIGHT - 8}">bits per weight; of this model everything counted</text>')
    return "\n".join([*parts, "</svg>", ""])


def _padded(loss: float) -> str:
    """Two digits, in as many characters as any number takes."""
    return f"{f'{loss:.2g}':>8}"
