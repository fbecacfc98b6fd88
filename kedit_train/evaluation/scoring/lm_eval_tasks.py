"""Run tasks of lm-eval (EleutherAI's evaluation harness) on a model in memory."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import inference_context, unwrap_model
from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.optional import require


@dataclass(frozen=True)
class LmEvalTasks:
    """The tasks of lm-eval to run. To run them, install ``kedit-train[eval]``.

    Args:
        names: names of tasks, or paths of task files (``.yaml``).
        folder: a folder with additional task files. ``names`` may contain the tasks in this folder.
        limit: maximum number of documents (test examples) per task. None uses all documents.
        shots: number of solved examples before each question. None uses the number that the task sets.

    Example:
        >>> from kedit_train.evaluation import LmEvalTasks
        >>> LmEvalTasks(["arc_easy"], limit=100).limit
        100
    """

    names: Sequence[str]
    _: KW_ONLY
    folder: str | None = None
    limit: int | None = None
    shots: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise EditError(
                f"names must be a list of strings, got {self.names!r}; put the string into a list.",
                component="LmEvalTasks",
            )


def lm_eval_scores(
    model: nn.Module, tokenizer: Any, tasks: LmEvalTasks, *, batch_size: int = 64, seed: int = 0
) -> dict[str, Score]:
    """Run tasks of lm-eval on a model and return the scores.

    Args:
        model: the model. It is left unchanged.
        tokenizer: the model's tokenizer. It is left unchanged.
        tasks: the tasks.
        batch_size: documents per forward pass.
        seed: seed of lm-eval. The random states of Python, numpy and torch are restored afterwards.

    Returns:
        A dict from "<task>/<metric>" to score. If the task filters the model's answers, the key is
        "<task>/<metric>,<filter>". The interval of a score is its value plus or minus 1.96 standard errors. If
        lm-eval returns no standard error, the score has no interval.

    Raises:
        EditError: lm-eval is not installed, or has no task with one of the names.
    """
    if not tasks.names:
        return {}
    with require("lm-eval", extra="eval"):
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    files = [name for name in tasks.names if name.endswith((".yaml", ".yml"))]
    for name in files:
        if not Path(name).is_file():
            raise EditError(f"tasks: there is no file {name!r}; pass an existing task file, or the name of a task.")
    manager = TaskManager(include_path=tasks.folder)
    for name in tasks.names:
        if name not in files and not manager.match_tasks([name]):
            raise EditError(
                f"tasks: lm-eval has no task {name!r}; choose a name from `lm-eval ls tasks`, or set "
                "LmEvalTasks.folder to the folder of the task file."
            )
    inner: Any = unwrap_model(model)
    with inference_context(inner), _preserved_random_state():
        wrapped: Any = HFLM(pretrained=inner, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        outcome: Any = simple_evaluate(
            wrapped,
            tasks=list(tasks.names),
            num_fewshot=tasks.shots,
            limit=tasks.limit,
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {
        name: score
        for task, values in outcome["results"].items()
        for name, score in _scores(task, values, outcome["n-samples"].get(task, {}).get("effective", 0))
    }


def _scores(task: str, values: dict[str, Any], n: int) -> Iterator[tuple[str, Score]]:
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if metric.endswith("_stderr") or not filter_name or isinstance(value, str):
            continue
        error = values.get(f"{metric}_stderr,{filter_name}")
        half_width = 1.96 * error if isinstance(error, int | float) and error == error else None
        low, high = (None, None) if half_width is None else (value - half_width, value + half_width)
        # A group of tasks has no documents of its own. The documents belong to the tasks in the group.
        count = n or int(values.get("sample_len", 0))
        suffix = f",{filter_name}" if filter_name != "none" else ""
        yield f"{task}/{metric}{suffix}", Score(float(value), n=count, low=low, high=high)


@contextmanager
def _preserved_random_state() -> Iterator[None]:
    import numpy as np

    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
