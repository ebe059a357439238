"""Options of qpalette plan, by the names of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None, typer.Argument(help="A Hugging Face directory, a .gguf file or a Hub id; not needed for --bits.")
]
Sensitivity = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity",
        metavar="FILE",
        help="JSON of qpalette sensitivity, or CSV: layer,linear,out_features,in_features,sensitivity.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="DIR",
        help="Plan for calibrated rounding: what its error costs is measured once, and kept in DIR.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="Where to measure that, such as cuda.")]
Bits = Annotated[str | None, typer.Option("--bits", metavar="R", help="At most R bits per weight, everything counted.")]
Disk = Annotated[
    str | None, typer.Option("--size", metavar="SIZE", help="At most so many bytes on disk in all, such as 6GB.")
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="At most so much device memory: weights, KV cache, activations."),
]
Context = Annotated[
    str,
    typer.Option(
        "--context",
        metavar="N",
        help="Tokens that --memory must hold, in a cache that is planned with the weights where --sensitivity has "
        "measured it (--cache); max: as many as fit.",
    ),
]
MaxLoss = Annotated[
    float | None, typer.Option("--max-loss", metavar="L", help="With --context max: at most this predicted loss.")
]
CacheOut = Annotated[
    Path | None, typer.Option("--cache-out", metavar="FILE", help="Write the plan of the cache alone, for --cache.")
]
Batch = Annotated[int, typer.Option("--batch", metavar="N", help="Sequences at once.")]
TokensPerSecond = Annotated[
    float | None,
    typer.Option("--tokens-per-second", metavar="N", help="At least so fast, by --profile, each sequence."),
]
Profile = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="FILE",
        help="Measured seconds of launches (docs/plan.md): a file, or h100-llama-3.1-8b.",
    ),
]
Fusion = Annotated[
    str, typer.Option("--fusion", help="Siblings in one launch: none, same (one spec), free (each its own).")
]
Effort = Annotated[str, typer.Option("--effort", help="fast, standard or best.")]
Family = Annotated[
    list[str] | None,
    typer.Option("--family", metavar="F", help="Only this family; may be repeated.  [default: all]"),
]
Prefer = Annotated[
    str | None,
    typer.Option(
        "--prefer",
        help="quality: any quantizer; or, at each rate, the fastest on --target of at most 10 % (balanced) or 20 % "
        "(speed) more distortion.  [default: balanced; with --tokens-per-second quality]",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="What the model is to run on, cpu or cuda; --profile says more.  [default: cuda if it is here]",
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option("--also", metavar="NAME", help="Plan this too: lm_head or embed_tokens. May be repeated."),
]
Experts = Annotated[
    str,
    typer.Option("--experts", help="Specs of a layer's experts: shared, tiers (by sensitivity) or free (own)."),
]
Rotation = Annotated[str, typer.Option("--rotation", help="full, block or block-N.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the rotation's signs.")]
Solver = Annotated[str, typer.Option("--solver", help="exact or lagrangian.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the plan, for quantize --plan.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw bits per linear and the Pareto front (.png).")
]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write one HTML page: this plan, and those of other budgets."),
]
Peers = Annotated[
    Path | None,
    typer.Option("--peers", metavar="FILE", help="In --report: models that qpalette compare --json has measured."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object.")]
