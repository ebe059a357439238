"""EleutherAI's lm-evaluation-harness on any loaded model: its tasks by name, or one of your own from a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qpalette.core.errors import InputError, UnsupportedError
from qpalette.core.text import first_line
from qpalette.models.vocabulary import check_tokenizer, check_tokens

TASK_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None


def read_tasks(names: str) -> list[str | dict[str, Any]]:
    """Comma-separated names of tasks and paths of task files, as `run_tasks` takes them.

    Raises InputError for a file that is no task, and UnsupportedError when lm-eval is not installed; call it before
    anything is loaded.
    """
    if find_spec("lm_eval") is None:
        raise UnsupportedError("--tasks needs lm-eval: pip install 'qpalette[eval]'")
    tasks = [name.strip() for name in names.split(",") if name.strip()]
    if not tasks:
        raise InputError("--tasks names no task")
    return [_read_file(Path(name).expanduser()) if name.endswith(TASK_FILES) else name for name in tasks]


def run_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str | dict[str, Any]], batch: int = 8, limit: int | None = None
) -> list[TaskScore]:
    """Scores of a transformers model. `limit` takes only the first examples of each task.

    Tasks by name fetch their data from the Hub. Raises InputError when lm-eval has no such task or no data for it.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    named = any(isinstance(task, str) for task in tasks)
    manager = TaskManager(include_defaults=named)  # thousands of files, read only when a name must be found
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what it tells is for those who start it by name

    class Checked(HFLM):
        """Tokens that the model does not know would be an index beyond its embedding, somewhere on a GPU."""

        def tok_encode(self, *args: Any, **kwargs: Any) -> Any:
            tokens = super().tok_encode(*args, **kwargs)
            check_tokens(tokens, model, tokenizer)
            return tokens

    check_tokenizer(tokenizer, model.name_or_path)
    wrapped = Checked(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    try:
        results = simple_evaluate(
            wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
        )
    except (KeyError, ValueError, OSError) as error:
        reason = first_line(error)
        raise InputError(f"lm-eval cannot run these tasks ({type(error).__name__}: {reason})") from error
    assert results is not None, "only processes of higher rank get nothing"
    return [score for task, metrics in results["results"].items() for score in _scores(task, metrics)]


def _read_file(file: Path) -> dict[str, Any]:
    """The task, its data files beside it found from anywhere. No code: lm-eval's tag !function is refused."""
    import yaml

    try:
        task = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        raise InputError(f"{file} cannot be read as a task ({reason})") from error
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise InputError(f"{file} is no task of lm-eval: it needs a field `task` with a name")
    options = task.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        options["data_files"] = _beside(file, options["data_files"])
    return task


def _beside(file: Path, data: Any) -> Any:
    """`data`, a path or a list or dictionary of them, where relative ones start at the task's folder if they exist."""
    if isinstance(data, dict):
        return {split: _beside(file, item) for split, item in data.items()}
    if isinstance(data, list):
        return [_beside(file, item) for item in data]
    near = file.absolute().parent / str(data)
    return str(near) if near.exists() else data


def _scores(task: str, metrics: dict[str, Any]) -> list[TaskScore]:
    """lm-eval's "acc,none" and "acc_stderr,none" as one score."""
    scores = []
    for key, value in metrics.items():
        metric, _, variant = key.partition(",")
        if metric.endswith("_stderr") or not isinstance(value, (int, float)) or not variant:
            continue
        stderr = metrics.get(f"{metric}_stderr,{variant}")
        name = metric if variant == "none" else f"{metric} ({variant})"
        scores.append(TaskScore(task, name, float(value), stderr if isinstance(stderr, float) else None))
    return scores
