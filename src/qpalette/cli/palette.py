"""qpalette palette: every quantizer, its rate, and how far it is from Shannon's bound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpalette.cli.output import print_json, print_note, print_table, step_bar
from qpalette.core.text import size, speed

if TYPE_CHECKING:
    from qpalette.codes import Quantizer
    from qpalette.evaluate import Measurement

CAPTION = "gap: distortion over Shannon's bound 2^(-2 rate); look-ups per weight into a table, when it is decoded"


def palette(
    measured: Annotated[
        list[str] | None, typer.Option("--measure", metavar="SPEC", help="Measure this quantizer; repeatable.")
    ] = None,
    weights: Annotated[int, typer.Option("--weights", metavar="N", help="Gaussian weights to measure on.")] = 1_000_000,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the Gaussian source.")] = 0,
    effort: Annotated[
        str | None,
        typer.Option(
            "--effort", help="fast, standard or best: how long the encoder searches.  [default: as the spec says]"
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where to measure: cpu, cuda, cuda:1.")] = "cpu",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw distortion against rate.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare", metavar="FILE.csv", help="Published figures for --plot: family,bits,composition,distortion."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of JSON objects.")] = False,
) -> None:
    """List the quantizers, or measure some of them on a Gaussian source.

    The gap is the distortion over Shannon's bound 2^(-2 rate): 1 is the bound itself.

    Example: [bold]qpalette palette --measure tcq-3.25 --measure nuq-4 --plot palette.png[/]
    """
    from qpalette.codes import full_palette, parse_spec
    from qpalette.core.errors import InputError

    if compare is not None and plot is None:
        raise InputError("--compare draws published figures into the picture of --plot; give both")
    quantizers = [parse_spec(spec) for spec in measured or ()] or list(full_palette())
    if effort is not None:
        quantizers = [_with_effort(quantizer, effort) for quantizer in quantizers]
    results = _measured(quantizers, weights, seed, device) if measured else []
    rows = [_measured_row(m) for m in results] if measured else [_claimed_row(q) for q in quantizers]
    if plot is not None:
        from qpalette.report.palette_plot import draw_palette, read_published

        draw_palette(rows, plot, read_published(compare) if compare else [])
        print_note(f"drawn: {plot}")
    if as_json:
        print_json(rows)
    else:
        _print_rows(rows)


def _with_effort(quantizer: Quantizer, effort: str) -> Quantizer:
    from qpalette.codes.trellis import EFFORT
    from qpalette.core.errors import SpecError

    if effort not in EFFORT:
        raise SpecError(f"'{effort}' is not an effort: choose {', '.join(EFFORT)}")
    return quantizer.with_effort(effort)


def _measured(quantizers: list[Quantizer], weights: int, seed: int, device: str) -> list[Measurement]:
    from qpalette.core.errors import InputError
    from qpalette.evaluate import measure

    if not -(1 << 63) <= seed < 1 << 64:
        raise InputError(f"the seed must fit in 64 bits, got {seed}")
    results = []
    with step_bar("measuring") as bar:
        for done, quantizer in enumerate(quantizers, start=1):
            results.append(measure(quantizer, weights, seed, device))
            bar.show(done, len(quantizers))
    return results


def _decode_cost(quantizer: Quantizer) -> dict[str, Any]:
    """Look-ups per weight, and the bytes of the table in float16."""
    decoder = quantizer.decoder
    if decoder is None:
        return {"lookups_per_weight": None, "table_bytes": None}
    return {"lookups_per_weight": 1 / decoder.width, "table_bytes": (2 << decoder.index_bits) * decoder.width}


def _measured_row(result: Measurement) -> dict[str, Any]:
    from qpalette.codes import parse_spec

    return {
        "spec": result.spec,
        **_decode_cost(parse_spec(result.spec)),
        "rate": float(result.rate),
        "claimed_distortion": result.claimed_distortion,
        "distortion": result.distortion,
        "gap": result.gap,
        "gap_bits": result.gap_bits,
        "gap_db": result.gap_db,
        "encode_weights_per_second": result.encode_weights_per_second,
        "decode_weights_per_second": result.decode_weights_per_second,
        "weights": result.weights,
    }


def _claimed_row(quantizer: Quantizer) -> dict[str, Any]:
    from qpalette.theory import gap, gap_bits, gap_db

    claimed = quantizer.claimed_distortion
    return {
        "spec": quantizer.name,
        **_decode_cost(quantizer),
        "rate": float(quantizer.rate),
        "claimed_distortion": claimed,
        "distortion": None,  # not measured
        "gap": gap(claimed, quantizer.rate),
        "gap_bits": gap_bits(claimed, quantizer.rate),
        "gap_db": gap_db(claimed, quantizer.rate),
    }


def _print_rows(rows: list[dict[str, Any]]) -> None:
    columns = ["spec", "rate (bits)", "claimed distortion"]
    measured = rows[0]["distortion"] is not None
    columns += ["measured distortion"] if measured else []
    columns += ["gap", "gap (bits)", "gap (dB)", "look-ups", "table"]
    columns += ["encoding", "decoding"] if measured else []
    cells = []
    for row in rows:
        line = [row["spec"], f"{row['rate']:g}", f"{row['claimed_distortion']:.4g}"]
        line += [f"{row['distortion']:.4g}"] if measured else []
        line += [f"{row['gap']:.3f}", f"{row['gap_bits']:.3f}", f"{row['gap_db']:.2f}"]
        line += [f"{row['lookups_per_weight']:g}", size(row["table_bytes"])]
        line += [speed(row["encode_weights_per_second"]), speed(row["decode_weights_per_second"])] if measured else []
        cells.append(line)
    source = f"a Gaussian source of {rows[0]['weights']} weights" if measured else "claimed"
    print_table(f"Palette, {source}", columns, cells, caption=CAPTION)
