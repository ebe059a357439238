"""qpalette eval --tasks: scores of lm-eval's tasks, beside the original's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qpalette.cli.output import print_json, print_table, quiet_transformers

if TYPE_CHECKING:
    import torch

    from qpalette.integrations.lm_eval import TaskScore


def score_tasks(model: str, reference: str | None, names: str, as_json: bool, device: torch.device) -> None:
    """Print a row for each metric of each task, with the reference's score when there is one."""
    from qpalette.evaluate import load_model
    from qpalette.integrations.lm_eval import read_tasks, run_tasks

    tasks = read_tasks(names)
    quiet_transformers()
    scores = run_tasks(*load_model(model, device), tasks)
    original = [] if reference is None else run_tasks(*load_model(reference, device), tasks)
    if as_json:
        print_json({"scores": scores, "reference": original or None})
        return
    before = {(score.task, score.metric): _describe(score) for score in original}
    rows = [
        (score.task, score.metric, *([before.get((score.task, score.metric), "")] if before else []), _describe(score))
        for score in scores
    ]
    columns = ("task", "metric", *(["reference"] if before else []), "score")
    print_table(model, columns, rows)


def _describe(score: TaskScore) -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" +- {score.stderr:.4f}")
