"""The process in which one cell is made and measured, so that its peak memory is its own.

A model is written by :func:`secateur.prune` and read back from its files, as a user would have it:
what is measured is what ``prune`` writes, tensors rounded, widths in the config and all. To run the
plan on the original instead would save the writing, but it would need all new weights in memory at
once, and it could not see a mistake of the writer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.progress import PeakMemory, Progress, process_memory, quiet
from secateur.workers import serve

if TYPE_CHECKING:
    from secateur.report.pruning import RunFacts

Tell = Callable[[Any], None]
#: Stage of :func:`secateur.prune` that is no part of pruning.
VERIFYING = "verifying in a fresh process"


class Told(Progress):
    """Hands every sign of life on to the asking process."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell

    def _show(self, detail: str, last: bool = False) -> None:
        self._tell(
            {
                "stage": self._stage,
                "done": self._done,
                "total": self._total,
                "detail": detail,
                "last": last,
                "memory": process_memory(),
            }
        )


def look(
    source: str,
    texts: list[str],
    tasks: list[str],
    limit: int | None,
    device: str,
    trust_remote_code: bool,
    **windows: Any,
) -> dict[str, Any]:
    """What decides whether cells are comparable: the source, the tokens, versions, the machine.

    Args:
        tasks, limit: as for :func:`secateur.zero_shot`; their data is that of ``data_dir``.
        windows: length, windows, text_field and data_dir of
            :func:`~secateur.evaluation.perplexity.evaluation_windows`.
    """
    import torch

    from secateur.checkpoint import local_path, open_checkpoint
    from secateur.devices import check_device
    from secateur.evaluation.perplexity import evaluation_windows
    from secateur.evaluation.zero_shot import task_conditions
    from secateur.opening import versions
    from secateur.streaming import Stream

    quiet()
    check_device(device)
    scored = task_conditions(tasks, limit, windows["data_dir"]) if tasks else {}
    path = local_path(source)
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    anatomy = Stream(checkpoint).anatomy
    evaluation = {}
    for text in texts:
        found = evaluation_windows(checkpoint, text=text, **windows)
        count, length = found.tokens.shape
        evaluation[text] = {
            "origin": found.origin,
            "windows": count,
            "length": length,
            "predictions": count * (length - 1),
            "tokens_sha256": found.sha256,
        }
    return {
        "source": {
            "name": path.name if path.exists() else source,  # a hub id is a name
            "fingerprint": checkpoint.fingerprint,
            "files": checkpoint.state(),
            "model_type": anatomy.model_type,
            "blocks": anatomy.layers,
            "parameters": anatomy.parameters,
            "decoder_parameters": anatomy.decoder_parameters,
        },
        "evaluation": evaluation,
        "tasks": scored,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "device": device,
    }


class Maker:
    """Makes the model of a cell, and knows until it ends what its page has to say."""

    def __init__(self) -> None:
        self._facts: RunFacts | None = None

    def prune(
        self,
        source: str,
        out: str,
        recipe: dict[str, Any],
        device: str,
        max_memory: str | None,
        trust_remote_code: bool,
        verify: bool,
        tell: Tell,
        beside: int = 1,
    ) -> dict[str, Any]:
        """Make one model.

        Args:
            beside: models that are made at a time and share ``max_memory``.

        Returns:
            shares from the plan, seconds and peak memory of this process, and the plan by block.
        """
        import torch

        from secateur.pruning import prune as run
        from secateur.recipe import make_recipe

        quiet()
        on_gpu = torch.device(device).type == "cuda"
        progress = Told(tell)
        began = time.perf_counter()
        with PeakMemory() as memory:
            result = run(
                source,
                out,
                make_recipe(**recipe),
                device=device,
                max_memory=max_memory,
                trust_remote_code=trust_remote_code,
                progress=progress,
                verify=verify,
                beside=beside,
            )
        seconds = time.perf_counter() - began - progress.seconds.pop(VERIFYING, 0.0)
        self._facts = result.facts
        summary, sizes = result.plan.summary(), result.plan.sizes()
        importances = result.choice.importances
        return {
            "share_removed": summary["share_removed"],
            "decoder_share_removed": summary["decoder_share_removed"],
            **({"zeros": result.plan.zeros / sizes.decoder} if result.plan.zeros else {}),
            "parameters": sizes.parameters,
            "seconds": seconds,
            "peak_memory": memory.peak,
            **({"gpu_peak_memory": torch.cuda.max_memory_allocated(device)} if on_gpu else {}),
            "stages": dict(progress.seconds),
            "removed_layers": summary["removed_layers"],
            "blocks": [
                {
                    "block": block["source"],
                    "share_removed": block["share_removed"],
                    "importance": importances.get(block["source"]),
                }
                for block in summary["blocks"]
            ],
        }

    def finish_page(
        self, out: str, perplexity: dict[str, tuple[float, float]], protocol: str
    ) -> None:
        """Put what was evaluated on the page of a model that is to stay.

        Args:
            perplexity: before and after, by text.
        """
        from secateur.report.pruning import write_pruning_page

        if self._facts is not None:  # None: made by a process that was killed before this one
            facts = replace(self._facts, perplexity=perplexity, protocol=protocol)
            write_pruning_page(Path(out), facts)


def evaluate(
    model: str, texts: dict[str, str], device: str, trust_remote_code: bool, tell: Tell, **rest: Any
) -> dict[str, float]:
    """Perplexity of a model, dense or pruned, on each text.

    Args:
        texts: hash of the tokens by the text's name.
        rest: length, windows, text_field and data_dir of :func:`secateur.evaluate`.

    Raises:
        VerifyError: the model's tokenizer gives other tokens.
    """
    from secateur.checkpoint import open_checkpoint
    from secateur.errors import VerifyError
    from secateur.evaluation import evaluate as run

    quiet()
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    found: dict[str, float] = {}
    for text, sha256 in texts.items():
        measured = run(checkpoint, text=text, device=device, progress=Told(tell), **rest)
        if measured.sha256 != sha256:
            raise VerifyError(
                f"{text} became other tokens than for the dense model: the text or the tokenizer "
                "changed during the comparison; choose another --out and start again"
            )
        found[text] = measured.value
    return found


def score(
    model: str,
    tasks: dict[str, Any],
    limit: int | None,
    data_dir: str | None,
    device: str,
    trust_remote_code: bool,
    tell: Tell,
) -> dict[str, dict[str, Any]]:
    """Zero-shot accuracy of a model, dense or pruned, on each task.

    Args:
        tasks: by name, what :func:`look` found of it.
        limit, data_dir: as for :func:`secateur.zero_shot`.

    Returns:
        the fields of :class:`~secateur.evaluation.TaskScore` by task.

    Raises:
        VerifyError: the items are others now.
    """
    from secateur.errors import VerifyError
    from secateur.evaluation.zero_shot import task_conditions, zero_shot

    quiet()
    for task, now in task_conditions(list(tasks), limit, data_dir).items():
        if now != tasks[task]:
            raise VerifyError(
                f"task {task} has other items than for the dense model: its files or lm-eval "
                "changed during the comparison; choose another --out and start again"
            )
    found = zero_shot(
        model,
        list(tasks),
        limit=limit,
        data_dir=data_dir,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=Told(tell),
    )
    fields = {one.task: asdict(one) for one in found}
    return {task: {k: v for k, v in one.items() if k != "task"} for task, one in fields.items()}


def main() -> None:
    """Answer tasks; see the top of this file."""
    maker = Maker()
    serve(
        {
            "look": look,
            "prune": maker.prune,
            "evaluate": evaluate,
            "score": score,
            "finish_page": maker.finish_page,
        }
    )


if __name__ == "__main__":
    main()
