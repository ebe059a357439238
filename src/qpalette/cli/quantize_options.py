"""Options of qpalette quantize, by the names of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DAMPING, OUTPUT_DAMPING = 0.03, 0.3  # those of `qpalette.quantize`, whose module takes seconds to import

Model = Annotated[str, typer.Argument(help="A Hugging Face directory, a .gguf file or a Hub id.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write; it must not exist.")]
Bits = Annotated[
    str | None,
    typer.Option("--bits", metavar="R", help="Budget in bits per weight, such as 3.25; scales and signs count."),
]
Spec = Annotated[str | None, typer.Option("--spec", metavar="S", help="Or the quantizer itself, such as tcq-3.25.")]
Plan = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="Or a plan, as qpalette plan --out writes it.")
]
Disk = Annotated[
    str | None, typer.Option("--size", metavar="SIZE", help="Or the size of OUT on disk, at most, such as 6GB.")
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Or the device memory of all: weights, cache, activations."),
]
Context = Annotated[
    int | None, typer.Option("--context", metavar="N", help="Tokens that --memory must hold.  [default: 4096]")
]
Batch = Annotated[
    int | None, typer.Option("--batch", metavar="N", help="Sequences at once, with --memory.  [default: 1]")
]
Fast = Annotated[
    bool, typer.Option("--fast", help="Without calibration, plan and tuning: minutes, and several times the loss.")
]
Best = Annotated[bool, typer.Option("--best", help="The longest search, more text, more tuning.")]
Sensitivity = Annotated[
    Path | None,
    typer.Option("--sensitivity", metavar="FILE", help="With --bits or --size: spend them by plan, on what matters."),
]
Effort = Annotated[
    str | None,
    typer.Option(
        "--effort", help="fast, standard or best: how long to search.  [default: standard, or as the spec says]"
    ),
]
Prefer = Annotated[
    str,
    typer.Option(
        "--prefer",
        help="With --bits or --size: quality; or, at each rate, the fastest on --target of at most 10 % (balanced) "
        "or 20 % (speed) more distortion.",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="What the model is to run on, cpu or cuda.  [default: cuda where --device or the machine is]",
    ),
]
Rotation = Annotated[str, typer.Option("--rotation", help="full, block or block-N.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the rotation's signs.")]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        "--hessians",
        metavar="DIR",
        help="Calibrated rounding, with what qpalette calibrate has measured.",
    ),
]
Damping = Annotated[float, typer.Option("--damping", help="Added to an input's Hessian, times its mean eigenvalue.")]
OutputDamping = Annotated[float, typer.Option("--output-damping", help="The same of an output's.")]
Equalize = Annotated[
    bool, typer.Option(help="With a calibration: columns of one norm, for 16 bits per input in place of 1.")
]
SignSeeds = Annotated[
    int, typer.Option("--sign-seeds", metavar="N", help="With Hessians: fit each rotation, the best of N.")
]
Also = Annotated[
    list[str] | None,
    typer.Option("--also", metavar="NAME", help="Quantize this too: lm_head or embed_tokens. May be repeated."),
]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="PATTERN", help="Quantize only linears of such names. May be repeated."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="Leave linears of such names, '*.0.mlp.*', as they are."),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="SPEC",
        help="How OUT keeps keys and values where nothing else is said: vq-3, a plan file, none (16 bits).  "
        "[default: as --plan says; within --memory, planned]",
    ),
]
Tune = Annotated[
    bool, typer.Option("--tune", help="Then tune row scales, diagonals and norms by KL, as qpalette tune does.")
]
Text = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="To calibrate and tune on.  [default: the model writes it]"),
]
Page = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write one HTML page: the plan, and those of other budgets."),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens", metavar="N", min=2, help="How much text to calibrate on.  [default: by device and --best]"
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", metavar="N", min=1, help="Of tuning, at most.  [default: by device and --best]"),
]
Device = Annotated[str, typer.Option("--device", help="Where to encode, such as cuda.")]
Workers = Annotated[int, typer.Option("--workers", help="Processes; with --device cuda they share the GPUs.")]
Ray = Annotated[
    str | None, typer.Option("--ray", metavar="ADDRESS", help="Run the workers in a Ray cluster, or 'local'.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done; reads headers alone.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a quantized model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
