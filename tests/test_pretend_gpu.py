"""Every method on another device than the CPU, which is pretended (``pretend_gpu.py``).

No test machine has a GPU; tensors that are left behind on the CPU are what a GPU would trip over.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Folder = Callable[[str], Path]
PROGRAM = Path(__file__).parent / "pretend_gpu.py"
CALIBRATION = {"samples": 4, "length": 32}
#: Drawn text hangs on the last digits of odds, which no two devices share.
NO_DRAWS = {"copies": 0, "written": 0}


def removal(method: str, **options: Any) -> dict[str, Any]:
    return {"method": method, "remove": "20%", "of": "decoder", "options": options}


def zeros(method: str, sparsity: str, **options: Any) -> dict[str, Any]:
    return {"method": method, "sparsity": sparsity, "options": options}


REMOVALS = {
    "comp": removal("comp"),
    "comp by inputs": removal("comp") | {"remove": "5%", "structure": "inputs"},
    "comp by condition": removal("comp", order="condition"),
    "comp by the letter": removal("comp", order="condition-literal"),
    "obs": removal("obs", **NO_DRAWS),
    "obs in rounds": removal("obs", **NO_DRAWS, rounds=1, groups="keep"),
    "obs by gradients": removal("obs", **NO_DRAWS, gradients=0.5),
    "flap": removal("flap"),
    "wanda-sp": removal("wanda-sp"),
    "magnitude-sp": removal("magnitude-sp"),
    "random": removal("random"),
    "shortgpt": removal("shortgpt") | {"remove": "25%"},
    "sleb": removal("sleb") | {"remove": "25%"},
    "fpt": removal("fpt"),
    "llm-pruner": removal("llm-pruner"),
    "saap": removal("saap"),
    "slicegpt": removal("slicegpt", multiple=1),
}
ZEROS = {
    "apt": zeros("apt", "50%"),
    "apt 2:4": zeros("apt", "2:4"),
    "apt SS": zeros("apt", "50%", solution="SS"),
    "sparsegpt": zeros("sparsegpt", "50%"),
    "wanda": zeros("wanda", "2:4"),
    "ria": zeros("ria", "2:4"),
    "magnitude": zeros("magnitude", "50%"),
    "removal and zeros": removal("obs", **NO_DRAWS) | {"then": "apt", "sparsity": "50%"},
}
#: What Mamba can have.
FOR_MAMBA = ("comp by inputs", "obs", "wanda-sp", "random", "apt", "sparsegpt")


def run(source: Path, folder: Path, cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the program says of each case."""
    folder.mkdir(exist_ok=True)
    found = subprocess.run(
        [sys.executable, str(PROGRAM), str(source), str(folder)],
        input="\n".join(map(json.dumps, cases)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    answers = {answer["name"]: answer for answer in map(json.loads, found.stdout.splitlines())}
    assert answers.keys() == {case["name"] for case in cases}
    return answers


def compare(answers: dict[str, dict[str, Any]]) -> None:
    failed = {name: answer["error"] for name, answer in answers.items() if answer["error"]}
    assert not failed
    for name, answer in answers.items():
        assert answer["gpu"]["kept"] == answer["cpu"]["kept"], name
        here, there = answer["cpu"]["zeros"], answer["gpu"]["zeros"]
        assert here == there, name


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("llama-gqa-tied", (*REMOVALS, *ZEROS)),
        ("opt", ("comp", "obs", "obs in rounds", "flap", "slicegpt", "apt 2:4")),
        ("mamba", FOR_MAMBA),
        ("mamba2", FOR_MAMBA),
    ],
)
def test_a_gpu_gives_the_same_plan(
    model: str, names: tuple[str, ...], model_folder: Folder, tmp_path: Path
) -> None:
    cases = [
        {"name": name, "recipe": {**{**REMOVALS, **ZEROS}[name], "calibration": CALIBRATION}}
        for name in names
    ]
    compare(run(model_folder(model), tmp_path / "out", cases))


def test_written_text_and_its_copies_on_a_gpu(model_folder: Folder, tmp_path: Path) -> None:
    recipe = removal("obs", copies=1, written=4)
    cases = [{"name": "obs", "recipe": {**recipe, "calibration": CALIBRATION}}]
    answer = run(model_folder("llama-gqa-tied"), tmp_path / "out", cases)["obs"]
    assert answer["error"] is None
    assert answer["gpu"]["kept"].keys() == answer["cpu"]["kept"].keys()


def test_perplexity_and_healing_on_a_gpu(model_folder: Folder, tmp_path: Path) -> None:
    run(model_folder("llama-gqa-tied"), tmp_path, [{"name": "small", "recipe": removal("comp")}])
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The cat number {i} sat on the mat and slept." for i in range(99)))
    settings = {"data": str(text), "steps": 3, "length": 16, "batch": 2}
    cases: list[dict[str, Any]] = [{"name": "score", "task": "evaluate"}]
    cases += [
        {"name": method, "task": "heal", "settings": {**settings, "method": method}}
        for method in ("lora", "groupwise")
    ]
    cases[-1]["settings"]["group"] = 16
    answers = run(tmp_path / "small-cpu", tmp_path / "healed", cases)
    for name, answer in answers.items():
        assert answer["error"] is None, name
        for key, value in answer["cpu"].items():
            assert answer["gpu"][key] == pytest.approx(value, rel=1e-3), (name, key)


def test_the_program_refuses_tensors_of_two_devices(tmp_path: Path) -> None:
    """What the tests above stand on: else nothing could fail there."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch\n"
        "from pretend_gpu import pretended\n"
        "with pretended():\n"
        "    x = torch.ones(3, 2).to('pretend')\n"
        "    assert x.device.type == 'pretend' and (2 * x @ x.T).device == x.device\n"
        "    assert x[torch.tensor([0, 2])].shape == (2, 2) and float(x.sum()) == 6\n"
        "    for wrong in (\n"
        "        lambda: x + torch.ones(3, 2),\n"
        "        lambda: torch.cat([x, torch.ones(3, 2)]),\n"
        "        lambda: torch.ones(3, 2)[x[:, 0].long()],\n"
        "        lambda: x.__setitem__(slice(2), torch.ones(2)[None] @ torch.ones(2, 2)),\n"
        "    ):\n"
        "        try:\n"
        "            wrong()\n"
        "        except RuntimeError as error:\n"
        "            print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(PROGRAM.parent)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.count("on the GPU and on the CPU") == 3, found.stdout  # the last is a copy
