"""Tasks of lm-evaluation-harness on models in memory, packed ones and ordinary ones alike. Needs the extra `eval`.

Gao et al., A framework for few-shot language model evaluation, https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_STANDARD_ERROR = "_stderr"
_SEED = 1234


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    original: nn.Module | None = None,
    include_path: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Runs tasks by name, on the original too if there is one.

    Names that include_path defines need no network when their data lie on disk; the others are the harness's own, whose
    data it downloads.

    Args:
        model: a Transformers language model.
        tokenizer: of both models.
        tasks: names of tasks or groups.
        include_path: directory of YAML files that define tasks.
        num_fewshot: solved examples before each question; None means what the task says.
        limit: questions per task; None for all.
        batch_size: questions at once.

    Returns:
        tasks: by name of task or group, by metric ("acc", "acc_norm", "word_perplexity", with the filter behind a slash
        where it is not "none"): value, standard_error, higher_is_better and, with an original, original,
        original_standard_error and difference (value - original).
        num_questions: by task. harness_version.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an unknown task; the message says where names were looked for.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "tasks need lm-evaluation-harness; install it with: pip install 'loop-singular-bit[eval]'"
        ) from error
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks: expected a sequence of names, got {tasks!r}")
    if include_path is not None and not os.path.isdir(include_path):
        raise ValueError(f"include_path: expected a directory of YAML files, got {include_path}")

    with _quiet_harness():
        manager = None
        if include_path is not None:
            manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if manager is None or any(not manager.match_tasks([task]) for task in tasks):
            # Reads the harness's thousands of task files, which takes a while.
            manager = TaskManager(include_path=None if include_path is None else str(include_path))
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if unknown:
            place = "" if include_path is None else f" and in {include_path}"
            raise ValueError(f"tasks: expected names that lm-evaluation-harness{place} defines, got {unknown[0]!r}")

        def run(evaluated: nn.Module) -> dict[str, Any]:
            results: dict[str, Any] = lm_eval.simple_evaluate(
                model=HFLM(pretrained=evaluated, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                random_seed=_SEED,
                numpy_random_seed=_SEED,
                torch_random_seed=_SEED,
                fewshot_random_seed=_SEED,
            )
            return results

        results = run(model)
        originals = None if original is None else _figures(run(original))
    figures = _figures(results)
    for task, metrics in figures.items():
        for name, metric in metrics.items():
            if originals is not None:
                other = originals[task][name]
                metric["original"] = other["value"]
                metric["original_standard_error"] = other["standard_error"]
                metric["difference"] = metric["value"] - other["value"]
    return {
        "tasks": figures,
        "num_questions": {task: counts["effective"] for task, counts in results["n-samples"].items()},
        "harness_version": lm_eval.__version__,
    }


def _figures(results: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The harness's "acc,none": 0.5, "acc_stderr,none": 0.1 as metrics with their errors."""
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for task, measured in results["results"].items():
        better = results["higher_is_better"].get(task, {})
        metrics: dict[str, dict[str, Any]] = {}
        for key, value in measured.items():
            name, comma, filtered = key.partition(",")
            if not comma or name.endswith(_STANDARD_ERROR) or not isinstance(value, (int, float)):
                continue
            error = measured.get(f"{name}{_STANDARD_ERROR},{filtered}")
            is_known = isinstance(error, (int, float)) and math.isfinite(error)
            metrics[name if filtered == "none" else f"{name}/{filtered}"] = {
                "value": float(value),
                "standard_error": float(error) if is_known else None,
                "higher_is_better": better.get(name),
            }
        figures[task] = metrics
    return figures


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """The harness logs its settings at length; only what goes wrong is let through."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
