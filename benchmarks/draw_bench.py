"""The picture of a run that `qpalette bench --out FILE` has kept.

python benchmarks/draw_bench.py benchmarks/results/FILE.json docs/speed.png
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import typer

from qpalette.bench import Share, Speed
from qpalette.report.bench_plot import draw_speeds
from qpalette.report.pictures import check_picture


def main(kept: Path, picture: Path) -> None:
    check_picture(picture)
    report = json.loads(kept.read_text(encoding="utf-8"))
    names = {field.name for field in fields(Speed)}
    speeds = [Speed(**{name: value for name, value in row.items() if name in names}) for row in report["speeds"]]
    shares = {model: [Share(**part) for part in parts] for model, parts in report["breakdown"].items()}
    draw_speeds(speeds, shares, picture, report["device"])


if __name__ == "__main__":
    typer.run(main)
