"""KL of coded caches beside what others do, at several rates and contexts; a table.

    python benchmarks/cache.py MODEL --text wiki.test.raw --calibration wiki.train.raw --device cuda
    python benchmarks/cache.py MODEL --text FILE --calibration FILE --windows 1 --length 512      # on a CPU
    [--windows 8] [--length 2048] [--spec vq-3 --spec fp8,sinks=4] [--no-prediction] [--name cache]

Every token is read through the cache, the first four are exact, and all bits are counted but those of exact tokens.
Predicted is the sum to second order of what the code's real errors cost, by one backward pass on calibration text.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import commit, device_name, keep

from qpalette.calibration.cache_moments import cost_of_errors, stream_costs
from qpalette.evaluate import load_model, token_windows
from qpalette.evaluate.cache import WHOLE, WINDOWS, evaluate_cache, moments_for
from qpalette.evaluate.cache_baselines import BASELINES, parse_baseline
from qpalette.kvcache import Exact, KeyMoments, Stream, key_transforms, parse_cache, white
from qpalette.kvcache.shaping import equal_rotation, unit_lower
from qpalette.kvcache.transform import power, raised

OURS = ("vq4-2", "vq-2", "vq-2.5", "vq-3", "nuq-3", "vq-3.5", "nuq-4", "vq-4")
BESIDE = ("balanced:vq-3", "mean:vq-3", "white:vq-3")
PREDICTED_WINDOWS, PREDICTED_LENGTH = 4, 1024


def predicted(model: Any, spec: str, windows: list[torch.Tensor], transforms: Any) -> float:
    """KL per token, of the errors that this cache makes on `windows`."""
    plan = parse_cache(spec)
    layers = len(transforms)

    def error_of(layer: int, states: torch.Tensor, place: int) -> torch.Tensor:
        dims = (states.shape[-1], states.shape[-1])
        transform = transforms[layer] if place == 0 else white(states.shape[-1])
        shape = (*states.shape[:2], states.shape[2])
        stream = Stream(
            plan.formats(layer, layers, dims)[place], transform, Exact(4, 0), shape, states.dtype, states.device
        )
        tokens, starts = (
            torch.arange(states.shape[2], device=states.device),
            torch.zeros(1, dtype=torch.int64).to(states.device),
        )
        stream.write(states, tokens, starts)
        return stream.read(tokens[-1] + 1, starts) - states

    def probe(layer: int, key: torch.Tensor, value: torch.Tensor) -> Any:
        return cost_of_errors([error_of(layer, key, 0)]), cost_of_errors([error_of(layer, value, 1)])

    costs = stream_costs(model, windows, probe)
    return float(sum(keys.sum() + values.sum() for keys, values in costs))


def print_costs(moments: list[KeyMoments]) -> None:
    """What an error of keys costs by each transform, all heads together, over reverse water-filling's bound."""
    sums: dict[str, float] = {}
    for moment in moments:
        covariance, queries = raised(moment.covariance.double()), raised(moment.queries.double())
        dim, root = covariance.shape[-1], power(covariance, 0.5)
        cost = root @ queries @ root
        values = torch.linalg.eigvalsh(cost)
        trace = [x.diagonal(dim1=1, dim2=2).sum(-1) for x in (covariance, queries)]
        parts = {"bound": dim * values.log().mean(-1).exp(), "mean": trace[0] * trace[1] / dim}
        parts["balanced"] = values.sqrt().sum(-1).square() / dim
        for block in (2, 8, 16):
            rotation = equal_rotation(cost, block)
            turned = rotation.mT @ cost @ rotation
            inverse = torch.linalg.inv(unit_lower(turned))
            parts[f"shaped, blocks of {block}"] = (inverse.mT @ turned @ inverse).diagonal(dim1=1, dim2=2).sum(-1)
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + float(part.sum())
    print("cost over the bound:", ", ".join(f"{name} {value / sums['bound']:.3f}" for name, value in sums.items()))


def main(
    model: str,
    text: Annotated[Path, typer.Option()],
    calibration: Annotated[Path, typer.Option()],
    windows: int = 8,
    length: int = 2048,
    device: str = "cpu",
    spec: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
    prediction: bool = True,
    name: str = "cache",
) -> None:
    torch.set_float32_matmul_precision("highest")
    loaded, tokenizer = load_model(model, device)
    test = token_windows(text, tokenizer, length, windows)
    train = token_windows(calibration, tokenizer, min(WHOLE, length), WINDOWS)
    held_out = token_windows(calibration, tokenizer, min(PREDICTED_LENGTH, length))[-PREDICTED_WINDOWS:]
    moments = moments_for(loaded, tokenizer, length, 4, train)
    print_costs(moments)
    rows: list[dict[str, Any]] = []
    facts = {"model": Path(model).name, "windows": windows, "length": len(test[0]), "commit": commit()}
    print("           cache    bits       KL      +-   median  99.9 %  top-1 predicted  seconds")
    for cache in spec if spec is not None else [*OURS, *BESIDE, *(f"{other},sinks=4" for other in BASELINES)]:
        start = time.perf_counter()
        found = evaluate_cache(loaded, tokenizer, cache, test, calibration=train)
        told = None
        if prediction and parse_baseline(cache) is None:
            plan = parse_cache(cache)
            dim = moments[0].mean.shape[-1]
            made = [white(dim)] * len(moments) if plan.transform == "white" else key_transforms(plan, moments)
            told = predicted(loaded, cache, held_out, made)
        seconds = time.perf_counter() - start
        rows.append({**vars(found), "predicted_cache_kl": told, "seconds": seconds})
        error, shown = found.kl_stderr or 0.0, "" if told is None else f"{told:.4f}"
        print(
            f"{cache:>16} {found.cache_bits:7.4f} {found.kl:8.4f} {error:7.4f} {found.kl_median:8.4f} "
            f"{found.kl_999:7.3f} {found.top1:6.3f} {shown:>9}  {seconds:.1f}",
            flush=True,
        )
        keep(name, device_name(device), rows, **facts)


if __name__ == "__main__":
    typer.run(main)
