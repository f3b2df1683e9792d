"""A stand-in for the process of a cell: it answers by simple rules and remembers its tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

DENSE = {"builtin": 20.0, "wikitext2": 30.0}
#: Items of a task, and the dense model's accuracy.
ITEMS = {"boolq": (3270, 0.6), "piqa": (1838, 0.7), "mmlu": (14042, 0.25)}
LOOK = {
    "source": {
        "name": "model",
        "fingerprint": "f00",
        "files": [["model.safetensors", 9, 9]],
        "model_type": "llama",
        "blocks": 3,
        "parameters": 1000,
        "decoder_parameters": 600,
    },
    "versions": {"secateur": "0", "torch": "1"},
    "threads": 1,
    "device": "cpu",
}


class StandIn:
    """Answers like the worker, by simple rules, and remembers what it was asked."""

    asked: ClassVar[list[tuple[str, str]]]
    failing: ClassVar[dict[str, BaseException]]
    look: ClassVar[dict[str, Any]]
    lm_eval: ClassVar[str]

    def __init__(self, module: str, what: str) -> None:
        self.what = what

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, task: str, told: Any = None, **given: Any) -> Any:
        return getattr(self, f"do_{task}")(told=told, **given)

    def do_look(
        self,
        texts: list[str],
        length: int,
        windows: int,
        tasks: list[str],
        limit: int | None,
        data_dir: str | None,
        **_: Any,
    ) -> Any:
        about = {
            "origin": "somewhere",
            "windows": windows,
            "length": length,
            "predictions": windows * (length - 1),
        }
        evaluation = {text: {**about, "tokens_sha256": f"{text}{length}"} for text in texts}
        asked = {
            task: {
                "limit": limit,
                "origin": "local files" if data_dir else "hub",
                "lm_eval": self.lm_eval,
                **({"items_sha256": f"{task} in {data_dir}"} if data_dir else {}),
            }
            for task in tasks
        }
        return {**self.look, "evaluation": evaluation, "tasks": asked}

    def do_prune(self, out: str, recipe: dict[str, Any], told: Any, **_: Any) -> Any:
        name = Path(out).name
        self.asked.append(("prune", name))
        told({"stage": "cutting", "done": 0, "total": 1, "detail": "", "last": False, "memory": 5})
        if name in self.failing:
            raise self.failing[name]
        Path(out).mkdir()
        share = float(recipe["remove"].rstrip("%")) / 100
        return {
            "share_removed": share * 0.6,
            "decoder_share_removed": share,
            "parameters": 1,
            "seconds": 10 * share + recipe["seed"],
            "peak_memory": 2**20 * (100 + recipe["seed"]),
            "stages": {"cutting": 1.0},
            "removed_layers": [1],
            "blocks": [
                {"block": 0, "share_removed": 0.0, "importance": 0.5},
                {"block": 2, "share_removed": share, "importance": 0.25},
            ],
        }

    def do_evaluate(self, model: str, texts: dict[str, str], **_: Any) -> dict[str, float]:
        name = Path(model).name
        self.asked.append(("evaluate", name))
        if name == "model":
            return {text: DENSE.get(text, 40.0) for text in texts}
        share = float(name.split("-")[1])
        seed = int(name[-1])
        worse = 1 + share / 10 * (1 if name.startswith("comp") else 2) + seed / 10
        return {text: DENSE.get(text, 40.0) * worse for text in texts}

    def do_score(self, model: str, tasks: dict[str, Any], limit: int | None, **_: Any) -> Any:
        name = Path(model).name
        self.asked.append((f"score {' '.join(tasks)}", name))
        if (failure := self.failing.get(f"score {name}")) is not None:
            raise failure
        worse = 0.0 if name == "model" else float(name.split("-")[1]) / 100 + int(name[-1]) / 50
        found = {}
        for task in tasks:
            of, acc = ITEMS[task]
            parts = 57 if task == "mmlu" else 1
            items = of if limit is None else min(of, limit * parts)
            found[task] = {
                "acc": acc - worse,
                "acc_error": (acc * (1 - acc) / (items - 1)) ** 0.5 if items > 1 else None,
                "acc_norm": None if task in ("boolq", "mmlu") else acc - worse / 2,
                "acc_norm_error": None,
                "items": items,
                "of": of,
                "subjects": parts,
                "origin": "hub",
            }
        return found

    def do_finish_page(self, **_: Any) -> None:
        self.asked.append(("page", ""))


GRID: dict[str, Any] = {
    "methods": ["comp", "obs"],
    "remove": ["10%", "20%"],
    "texts": ["wikitext2"],
    "windows": 4,
    "window_length": 11,
}


def pruned(stand_in: type[StandIn]) -> list[str]:
    return [name for task, name in stand_in.asked if task == "prune"]


def load(out: Path) -> Any:
    return json.loads((out / "compare.json").read_text())
