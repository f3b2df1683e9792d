"""Zero-shot accuracy on multiple-choice tasks, through EleutherAI's lm-eval (an optional extra).

A choice's score is the sum of the log-likelihoods of its tokens behind the prompt. ``acc`` counts
the items whose right choice scores best, ``acc_norm`` those where it scores best by the byte.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.checkpoint import Checkpoint, open_checkpoint
from secateur.checkpoint.base import first_line
from secateur.devices import check_device
from secateur.errors import RecipeError, SecateurError, SourceError
from secateur.evaluation.zero_shot_data import LOCAL, MMLU, read_local, rows_sha256
from secateur.progress import Progress

TASKS = tuple(LOCAL)
#: lm-eval's names for the 57 subjects of mmlu, in four parts.
_MMLU_TAGS = tuple(
    f"mmlu_{part}_tasks" for part in ("stem", "other", "social_sciences", "humanities")
)
#: Where a task's items are from.
FILES, HUB = "local files", "hub"
#: Folders of lm-eval that hold these tasks; to go through all its thousands takes half a minute.
_FOLDERS = ("super_glue/boolq", "piqa", "sciq", "winogrande", "logiqa", "mmlu/default")


@dataclass(frozen=True)
class TaskScore:
    """Accuracy on one task; shares from 0 to 1.

    Attributes:
        task: its name.
        acc, acc_error: accuracy and its standard error; None for the error of a single item.
        acc_norm, acc_norm_error: by the byte; None where lm-eval does not define it for the task.
        items: how many were asked.
        of: how many there are.
        subjects: parts that were pooled by their items: 57 for mmlu, else 1.
        origin: ``local files`` or ``hub``.
    """

    task: str
    acc: float
    acc_error: float | None
    acc_norm: float | None
    acc_norm_error: float | None
    items: int
    of: int
    subjects: int
    origin: str


def zero_shot(
    source: str | Path | Checkpoint,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[TaskScore]:
    """Zero-shot accuracy of a model, dense or pruned, folder, GGUF file or hub id.

    The whole model is held in memory in float32. A pruned folder is built from Secateur's own
    classes; the modelling file in it is not run.

    Args:
        source: the model, or one that is open already.
        tasks: names among :data:`TASKS`.
        limit: the first items of each task, for mmlu of each subject; None for all.
        data_dir: folder with the tasks' files; without it lm-eval fetches them from the hub.

    Raises:
        RecipeError: an unknown task, no task, a limit below one, or lm-eval is not installed.
        SourceError: the model does not open, or a task's data is missing.
    """
    names = check_tasks(tasks, limit)
    local = {n: read_local(n, data_dir) for n in names} if data_dir is not None else {}
    require_harness()
    place = check_device(device)
    if isinstance(source, Checkpoint):
        checkpoint = source
    else:
        checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)

    from secateur.calibration import check_vocabulary
    from secateur.evaluation.harness_model import HarnessModel
    from secateur.evaluation.speed import load_whole

    check_vocabulary(checkpoint.tokenizer, int(checkpoint.config.vocab_size))
    longest = getattr(checkpoint.config, "max_position_embeddings", None) or 2048
    model = load_whole(checkpoint).to(place)
    harness = HarnessModel(model, checkpoint.tokenizer, longest, str(place), progress or Progress())
    scores = []
    for name in names:
        harness.stage = f"zero-shot {name}"
        scores.append(_score(harness, name, local.get(name), limit))
    return scores


def task_conditions(
    tasks: Sequence[str], limit: int | None, data_dir: str | Path | None
) -> dict[str, dict[str, Any]]:
    """By task, what decides whether two scores of it may stand beside each other.

    Args:
        tasks, limit, data_dir: as for :func:`zero_shot`.

    Returns:
        ``limit``, ``origin`` (``local files`` or ``hub``), ``lm_eval`` (its version) and, of local
        files, ``items_sha256`` of all their items.

    Raises:
        RecipeError, SourceError: as for :func:`zero_shot`; from the hub nothing is fetched yet.
    """
    names = check_tasks(tasks, limit)
    local = {n: read_local(n, data_dir) for n in names} if data_dir is not None else {}
    require_harness()
    import lm_eval

    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = {"limit": limit, "origin": HUB, "lm_eval": str(lm_eval.__version__)}
        if name in local:
            found[name] |= {"origin": FILES, "items_sha256": rows_sha256(local[name])}
    return found


def check_tasks(tasks: Sequence[str], limit: int | None) -> list[str]:
    """The tasks, each once.

    Raises:
        RecipeError: see :func:`zero_shot`.
    """
    known = ", ".join(TASKS)
    if not tasks:
        raise RecipeError(f"--tasks names no task: give some of {known}, with commas between them")
    for task in tasks:
        if task not in TASKS:
            raise RecipeError(f"task {task} is not known: tasks are {known}")
    if limit is not None and limit < 1:
        raise RecipeError(f"--limit is {limit}: give 1 or more items, or leave it out for all")
    return list(dict.fromkeys(tasks))


def require_harness() -> None:
    """Refuse where lm-eval cannot be imported.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            "--tasks needs the package lm-eval, which is not installed: "
            "pip install 'secateur[zero-shot]'"
        ) from error


def _score(harness: Any, task: str, local: Any, limit: int | None) -> TaskScore:
    import logging

    import lm_eval
    from lm_eval.tasks import TaskManager

    folders = [Path(lm_eval.__file__).parent / "tasks" / folder for folder in _FOLDERS]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    wanted: list[Any]
    if local is not None:
        # Only as members of a group do settings go over a definition instead of replacing it.
        members = [_over_local_rows(name, task, rows) for name, rows in local.items()]
        wanted = [{"group": f"{task}_local", "task": members}]
    else:
        wanted = list(_MMLU_TAGS) if task == MMLU else [task]
    # lm-eval has bars of its own on standard error.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            found = lm_eval.simple_evaluate(
                model=harness,
                tasks=wanted,
                task_manager=TaskManager(include_path=folders, include_defaults=False),
                num_fewshot=0,
                limit=limit,
                log_samples=False,
                random_seed=0,
                numpy_random_seed=0,
                torch_random_seed=0,
                fewshot_random_seed=0,
            )
        except SecateurError:
            raise
        except Exception as error:  # network, hub and data errors are of many kinds
            if local is not None:
                raise  # nothing was fetched: a bug of ours
            raise SourceError(
                f"task {task} cannot be fetched from the hub ({first_line(error)}): check the "
                "network, or name a folder with its files with --data-dir"
            ) from error
    return _pooled(task, found, HUB if local is None else FILES)


def _over_local_rows(name: str, task: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's own definition of ``name``, with these rows in the place of the hub's."""
    from datasets import Dataset

    split = LOCAL[task].split
    own = {"training_split": None, "validation_split": None, "test_split": None}
    return {
        "task": name,
        **own,
        "fewshot_split": None,
        f"{split}_split": split,
        "custom_dataset": lambda **_: {split: Dataset.from_list(rows)},
    }


def _pooled(task: str, found: Any, origin: str) -> TaskScore:
    """One score of all subjects, weighted by their items as lm-eval weights mmlu."""
    from lm_eval.api.metrics import pooled_sample_stderr

    parts = [name for name in found["n-samples"] if name in found["results"]]
    sizes = [int(found["n-samples"][name]["effective"]) for name in parts]

    def over(metric: str) -> tuple[float | None, float | None]:
        values = [found["results"][name].get(f"{metric},none") for name in parts]
        if None in values:
            return None, None
        mean = sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)
        errors = [found["results"][name].get(f"{metric}_stderr,none") for name in parts]
        if not all(isinstance(error, float) for error in errors):
            return mean, None
        return mean, errors[0] if len(errors) == 1 else float(pooled_sample_stderr(errors, sizes))

    acc, acc_error = over("acc")
    assert acc is not None
    norm, norm_error = over("acc_norm")
    of = sum(int(found["n-samples"][name]["original"]) for name in parts)
    return TaskScore(task, acc, acc_error, norm, norm_error, sum(sizes), of, len(parts), origin)
