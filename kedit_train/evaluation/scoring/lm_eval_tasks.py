"""The tasks of lm-eval (EleutherAI's evaluation harness) on the live model, by name or from a local file."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import evaluating, unwrapped
from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.optional import require


def harness_scores(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Score]:
    """Run tasks on a model in memory.

    Args:
        tasks: names that lm-eval knows or finds in ``folder``, or paths of task files (``.yaml``).
        limit: documents of each task; shots: examples before each question; None takes the task's own number.
        seed: of what lm-eval draws. Its seeding of Python, numpy and torch is undone, as is what it does to the
            tokenizer.

    Returns:
        ``"<task>/<metric>"`` (with ``",<filter>"`` where the task has one of its own) -> score; its interval is the
        value and 1.96 times the standard error that lm-eval gives, and there is none where it gives none.

    Raises:
        EditError: lm-eval is not installed, or knows no such task.
    """
    if not tasks:
        return {}
    with require("lm-eval", extra="eval"):
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    for task in files:
        if not Path(task).is_file():
            raise EditError(f"tasks: there is no file {task!r}; give the path of a task file, or a name")
    manager = TaskManager(include_path=folder)
    for task in tasks:
        if task not in files and not manager.match_tasks([task]):
            raise EditError(f"tasks: lm-eval knows no {task!r}: see `lm-eval ls tasks`, or give task_folder")
    inner: Any = unwrapped(model)
    with evaluating(inner), _random_state():
        host: Any = HFLM(pretrained=inner, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found: Any = simple_evaluate(
            host,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {
        name: score
        for task, measured in found["results"].items()
        for name, score in _scores(task, measured, found["n-samples"].get(task, {}).get("effective", 0))
    }


def _scores(task: str, measured: dict[str, Any], n: int) -> Iterator[tuple[str, Score]]:
    for key, value in measured.items():
        metric, _, chosen = key.partition(",")
        if metric.endswith("_stderr") or not chosen or isinstance(value, str):
            continue
        error = measured.get(f"{metric}_stderr,{chosen}")
        half = 1.96 * error if isinstance(error, int | float) and error == error else None
        low, high = (None, None) if half is None else (value - half, value + half)
        # A group has no documents of its own: its tasks' are in it.
        count = n or int(measured.get("sample_len", 0))
        yield f"{task}/{metric}" + (f",{chosen}" if chosen != "none" else ""), Score(float(value), count, low, high)


@contextmanager
def _random_state() -> Iterator[None]:
    import numpy as np

    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
