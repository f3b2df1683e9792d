"""Zero-shot tasks in a comparison: by a stand-in for the worker, and once for real."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from commands import secateur
from pages import check_alone
from stand_in import GRID, StandIn, load

from secateur.comparison import worker
from secateur.comparison.cells import make_cells
from secateur.comparison.run import compare
from secateur.comparison.time_left import seconds_left
from secateur.errors import OutputError, RecipeError, SourceError, VerifyError

ONE: dict[str, Any] = {"methods": ["comp"], "remove": ["10%"]}
TASKS: dict[str, Any] = {"tasks": ["boolq", "piqa"], "limit": 20, "data_dir": "data"}


# ---- the table -----------------------------------------------------------------------------------


def test_accuracies_are_columns(stand_in: type[StandIn], tmp_path: Path) -> None:
    found = compare("model", tmp_path / "out", **ONE, **TASKS)
    table = found.table
    assert [column.title for column in table.columns] == [
        "removed of all, %", "of the decoder, %", "perplexity, builtin", "boolq acc, %",
        "piqa acc, %", "piqa acc_norm, %", "mean acc, %", "to prune, s", "peak memory, MiB",
    ]  # fmt: skip
    dense, comp = (row.texts(table.columns)[3:7] for row in table.rows)
    assert dense == ["60.0", "70.0", "70.0", "65.0"]
    assert comp == ["50.0", "60.0", "65.0", "55.0"]
    text = (tmp_path / "out" / "compare.md").read_text()
    assert (
        "\n| comp | 10% of all | 6.00 | 10.00 | 40.00 | 50.0 | 60.0 | 65.0 | 55.0 | 1 | 100 |\n"
        in text
    )
    # 0.6 * 0.4 and 0.7 * 0.3 over 19: the former is the larger, 0.1124.
    assert (
        "\n- Zero-shot accuracy by lm-eval 0.4.13, items from local files, no examples in the "
        "prompt, float32: boolq, the first 20 of 3,270 items; piqa, the first 20 of 1,838 items. "
        "The largest standard error of an acc is 11.2 points. The mean is that of acc, each task "
        "counted once.\n" in text
    )


def test_one_task_has_no_mean_and_subjects_are_counted(
    stand_in: type[StandIn], tmp_path: Path
) -> None:
    compare("model", tmp_path / "some", **ONE, tasks=["mmlu"], limit=2)
    text = (tmp_path / "some" / "compare.md").read_text()
    assert "| mmlu acc, % | to prune, s |" in text
    assert (
        "\n- Zero-shot accuracy by lm-eval 0.4.13, items from the hub, no examples in the prompt, "
        "float32: mmlu, the first 2 of each of 57 subjects, 114 of 14,042 items. The largest "
        "standard error of an acc is 4.1 points.\n" in text
    )
    compare("model", tmp_path / "all", **ONE, tasks=["mmlu"])
    assert "float32: mmlu, all 14,042 items. The" in (tmp_path / "all" / "compare.md").read_text()
    compare("model", tmp_path / "one", **ONE, tasks=["piqa"], limit=1)
    text = (tmp_path / "one" / "compare.md").read_text()
    assert "float32: piqa, the first 1 of 1,838 items.\n" in text  # of one item there is no error


def test_csv_and_json_have_numbers_in_full(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare("model", out, **ONE, seeds=[0, 1], **TASKS)
    lines = list(csv.DictReader(io.StringIO((out / "compare.csv").read_text())))
    # 0.7 - 0.1 - seed / 50, and half of that fall
    assert [float(line["acc piqa"]) for line in lines] == pytest.approx([0.7, 0.6, 0.58])
    assert [float(line["acc_norm piqa"]) for line in lines] == pytest.approx([0.7, 0.65, 0.64])
    assert [float(line["acc mean"]) for line in lines] == pytest.approx([0.65, 0.55, 0.53])
    assert "acc_norm boolq" not in lines[0]
    found = load(out)
    values = found["rows"][1]["values"]
    assert values["acc boolq"] == pytest.approx({"median": 0.49, "low": 0.48, "high": 0.5})
    for cell in found["cells"]:
        assert cell["scores"]["piqa"]["items"] == 20
        assert cell["scores"]["piqa"]["of"] == 1838
    assert found["settings"]["tasks"]["piqa"] == {
        "limit": 20, "origin": "local files", "lm_eval": "0.4.13", "items_sha256": "piqa in data",
    }  # fmt: skip
    assert "| 59.0 (58.0–60.0) |" in (out / "compare.md").read_text()


def test_the_page_draws_accuracy_over_the_share(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare("model", out, methods=["comp"], remove=["10%", "20%", "30%"], **TASKS)
    page = check_alone((out / "report.html").read_text())
    assert "Zero-shot accuracy over what was removed" in page.texts["h2"]
    captions = [text for text in page.texts["figcaption"] if "items" in text or "mean" in text]
    assert captions == [
        "the mean over boolq, piqa",
        "boolq, the first 20 of 3,270 items; standard errors up to 11.2 points",
        "piqa, the first 20 of 1,838 items; standard errors up to 10.5 points",
    ]
    (chart,) = re.findall(
        r'<svg[^>]*aria-label="acc on boolq, % over [^>]*>.*?</svg>', page.source, re.DOTALL
    )
    assert ">dense 60.0</text>" in chart
    assert "comp: 10% of all asked, 6.00% of all parameters removed, acc on boolq 50.0" in chart
    # Ten points less at each step, the dense model's line being the first: as far apart on paper.
    base = re.findall(r'class="base"[^>]* y1="([\d.]+)"', chart)
    heights = [float(y) for y in base + re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', chart)]
    steps = [after - before for before, after in pairwise(heights)]
    assert len(steps) == 3
    assert steps[0] > 20
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)


def test_without_tasks_nothing_is_said_of_them(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare("model", out, **GRID)
    for name in ("compare.md", "compare.csv", "report.html"):
        assert "acc" not in re.sub(r"<style>.*?</style>", "", (out / name).read_text(), flags=re.S)
    assert not any(task.startswith("score") for task, _ in stand_in.asked)


def test_a_finished_cell_says_its_accuracies(stand_in: type[StandIn], tmp_path: Path) -> None:
    ended = secateur(
        "compare", "model", "--methods", "comp", "--remove", "10%", "--tasks", "boolq, piqa",
        "--limit", "20", "--out", tmp_path / "out",
    )  # fmt: skip
    ended.fine()
    assert ended.err[-1] == (
        "[1/1] comp, 10% of all  seed 0  builtin 40.00  boolq 50.0%  piqa 60.0%  0 s"
    )


# ---- going on ------------------------------------------------------------------------------------


def test_tasks_may_be_added(stand_in: type[StandIn], tmp_path: Path) -> None:
    """A model that is gone is made again; what was measured of it stays as it is."""
    out = tmp_path / "out"
    compare("model", out, **ONE, tasks=["piqa"])
    before = load(out)["cells"][1]
    stand_in.asked.clear()
    ended = secateur(
        "compare", "model", "--methods", "comp,obs", "--remove", "10%", "--tasks", "piqa,boolq",
        "--out", out,
    )  # fmt: skip
    ended.fine()
    assert stand_in.asked == [
        ("score boolq", "model"),
        ("prune", "comp-10-seed0"),
        ("score boolq", "comp-10-seed0"),
        ("prune", "obs-10-seed0"),
        ("evaluate", "obs-10-seed0"),
        ("score piqa boolq", "obs-10-seed0"),
    ]
    assert (
        "measured before without all of these tasks: 1 cell, of which 1 must be pruned again "
        "(--keep lets models stay)" in ended.err
    )
    after = load(out)["cells"][1]
    added = {k: v for k, v in after["measures"].items() if k not in before["measures"]}
    assert added == pytest.approx({"acc boolq": 0.5, "acc mean": 0.55})
    assert {**after["measures"], **before["measures"]} == after["measures"]
    assert not (out / "work").exists()


def test_a_model_that_stayed_is_only_scored(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare("model", out, **ONE, keep=True)
    stand_in.asked.clear()
    compare("model", out, **ONE, keep=True, tasks=["piqa"])
    assert stand_in.asked == [("score piqa", "model"), ("score piqa", "comp-10-seed0")]
    assert (out / "models" / "comp-10-seed0").is_dir()


def test_a_folder_may_be_named_for_tasks_alone(stand_in: type[StandIn], tmp_path: Path) -> None:
    """The built-in text does not lie in it; a named set does, and may be another one there."""
    compare("model", tmp_path / "a", **ONE)
    found = compare("model", tmp_path / "a", **ONE, **TASKS)
    assert found.table.rows[1].texts(found.table.columns)[3] == "50.0"
    compare("model", tmp_path / "b", **ONE, calibration={"source": "c4"})
    with pytest.raises(OutputError, match=r"recipe \(different: calibration.data_dir\): repeat"):
        compare("model", tmp_path / "b", **ONE, **TASKS, calibration={"source": "c4"})


def test_tasks_may_be_left_out(stand_in: type[StandIn], tmp_path: Path) -> None:
    """And are still known when they are named again."""
    out = tmp_path / "out"
    compare("model", out, **ONE, **TASKS)
    whole = (out / "compare.md").read_text()
    stand_in.asked.clear()
    found = compare("model", out, **ONE, data_dir="data", tasks=["piqa"], limit=20)
    assert "boolq" not in json.dumps(load(out))
    assert found.table.rows[1].texts(found.table.columns)[3:5] == ["60.0", "65.0"]
    compare("model", out, **ONE, data_dir="data")
    assert "acc" not in (out / "compare.md").read_text()
    compare("model", out, **ONE, **TASKS)
    assert (out / "compare.md").read_text() == whole
    assert stand_in.asked == []


def test_other_items_are_refused(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare("model", out, **ONE, tasks=["piqa"], limit=20)
    stand_in.asked.clear()
    with pytest.raises(OutputError) as refused:
        compare("model", out, **ONE, tasks=["boolq", "piqa"], limit=30)
    assert str(refused.value) == (
        f"{out} holds cells that were measured otherwise (different: tasks.piqa.limit): repeat "
        f"that command, choose another --out, or remove the folder with rm -r {out}"
    )
    stand_in.lm_eval = "0.5"
    with pytest.raises(OutputError, match=r"\(different: tasks.piqa.lm_eval\)"):
        compare("model", out, **ONE, tasks=["piqa"], limit=20)
    assert stand_in.asked == []


def test_a_score_that_fails_leaves_what_was_known(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare("model", out, **ONE)
    before = (out / "cells" / "comp-10-seed0.json").read_bytes()
    stand_in.failing = {"score comp-10-seed0": SourceError("no network")}
    found = compare("model", out, **ONE, tasks=["piqa"])
    assert found.failed == {"comp-10-seed0": "no network"}
    assert found.table.rows[1].remarks() == ["failed: no network"]
    assert (out / "cells" / "comp-10-seed0.json").read_bytes() == before
    stand_in.failing = {}
    stand_in.asked.clear()
    assert compare("model", out, **ONE, tasks=["piqa"]).failed == {}
    assert stand_in.asked == [("score piqa", "comp-10-seed0")]  # the model lay in work/


def test_killed_between_perplexity_and_score(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stand_in.failing = {"score comp-10-seed0": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        compare("model", out, **ONE, **TASKS)
    stand_in.failing = {}
    stand_in.asked.clear()
    found = compare("model", out, **ONE, **TASKS)
    assert stand_in.asked == [("score boolq piqa", "comp-10-seed0")]
    assert found.table.rows[1].texts(found.table.columns)[2:6] == ["40.00", "50.0", "60.0", "65.0"]


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({"calibration": {"samples": 64}}, ["prune", "evaluate"]),
        ({"window_length": 12}, ["evaluate"]),
    ],
)
def test_work_of_another_command_is_not_gone_on_from(
    stand_in: type[StandIn], tmp_path: Path, changed: dict[str, Any], again: list[str]
) -> None:
    """Until a cell is finished the command may be mended, and what it left may fit no more."""
    out = tmp_path / "out"
    stand_in.failing = {"score comp-10-seed0": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        compare("model", out, **ONE, tasks=["piqa"])
    stand_in.failing = {}
    stand_in.asked.clear()
    compare("model", out, **ONE, tasks=["piqa"], **changed)
    assert [task for task, name in stand_in.asked if name == "comp-10-seed0"] == [
        *again, "score piqa",
    ]  # fmt: skip


def test_time_left_of_cells_that_are_measured_further() -> None:
    cells = make_cells(methods=["comp", "obs"], remove=["1%", "2%", "3%"])
    earlier = {f"{m}-{n}-seed0": {"wall": 100.0} for m in ("comp", "obs") for n in (1, 2)}
    assert seconds_left(cells, {}, earlier) is None
    results = {"comp-1-seed0": {"wall": 107.0}}  # seven of them for the tasks
    assert seconds_left(cells, results, earlier) == 3 * 7 + 2 * 7  # nothing else to go by
    results["comp-3-seed0"] = {"wall": 60.0}
    assert seconds_left(cells, results, earlier) == 3 * 7 + 60
    results["obs-1-seed0"] = {"wall": 111.0}
    assert seconds_left(cells, results, earlier) == 7 + 11 + 60


# ---- refusals ------------------------------------------------------------------------------------


def words(out: Path, *more: object) -> tuple[object, ...]:
    return ("compare", "m", "--methods", "comp", "--remove", "10%", "--out", out, *more)


def test_mistakes_are_refused_before_anything_is_opened(tmp_path: Path) -> None:
    out = tmp_path / "out"
    secateur(*words(out, "--tasks", "piqa,arc")).refused_at_once(
        "task arc is not known: tasks are boolq, piqa, sciq, winogrande, logiqa, mmlu"
    )
    secateur(*words(out, "--tasks", ",")).refused_at_once(
        "--tasks names no task: give some of boolq, piqa, sciq, winogrande, logiqa, mmlu, with "
        "commas between them"
    )
    secateur(*words(out, "--limit", "5")).refused_at_once(
        "--limit 5 is of zero-shot tasks, and none is named: add --tasks boolq,piqa, or leave it "
        "out"
    )
    with pytest.raises(RecipeError, match=r"^--limit is 0: give 1 or more items"):
        compare("m", out, **ONE, tasks=["piqa"], limit=0)
    assert not out.exists()


def test_missing_files_are_named_before_any_cell_is_run(tmp_path: Path) -> None:
    """By the real process, which has not even opened the model."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    secateur(*words(out, "--tasks", "piqa", "--data-dir", data)).refused_at_once(
        f"task piqa needs piqa_valid.jsonl, which is not in {data}: put it there, or leave out "
        "--data-dir to fetch the task from the hub"
    )
    assert list(out.iterdir()) == []


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError) as refused:
        worker.look("never opened", [], ["piqa"], None, "cpu", False, data_dir=None)
    assert str(refused.value) == (
        "--tasks needs the package lm-eval, which is not installed: "
        "pip install 'secateur[zero-shot]'"
    )


def test_items_that_change_on_the_way_are_noticed(
    stand_in: type[StandIn], tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from secateur.evaluation import task_conditions

    then = task_conditions(["sciq"], 3, files)
    assert then["sciq"]["origin"] == "local files"
    path = files / "sciq_test.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    with pytest.raises(VerifyError) as refused:
        worker.score("never opened", then, 3, str(files), "cpu", False, lambda _: None)
    assert str(refused.value) == (
        "task sciq has other items than for the dense model: its files or lm-eval changed during "
        "the comparison; choose another --out and start again"
    )
    # Of the hub nothing is known but how many there are.
    real = StandIn.do_score

    def longer(self: StandIn, model: str, **given: Any) -> Any:
        found = real(self, model, **given)
        found["piqa"]["of"] += not model.endswith("model")
        return found

    monkeypatch.setattr(StandIn, "do_score", longer)
    assert compare("model", tmp_path / "out", **ONE, tasks=["piqa"], limit=9).failed == {
        "comp-10-seed0": (
            "task piqa has 9 of 1839 items, and had 9 of 1838 for the dense model: it changed "
            "during the comparison; choose another --out and start again"
        )
    }


# ---- for real ------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Six made-up items of piqa and of sciq."""
    folder = tmp_path / "items"
    folder.mkdir()
    nouns = ["salt", "old iron", "a long green river", "two", "seven days", "x"]
    piqa = [{"goal": f"keep {n}", "sol1": n[::-1], "sol2": f"{n} {n}"} for n in nouns]
    sciq = [
        {
            "question": f"What is {n}?",
            "support": f"Of {n}.",
            **{f"distractor{i}": nouns[i] for i in (1, 2, 3)},
            "correct_answer": n[:3],
        }
        for n in nouns
    ]
    for name, rows in (("piqa_valid.jsonl", piqa), ("sciq_test.jsonl", sciq)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "piqa_valid-labels.lst").write_text("0\n1\n1\n0\n1\n0\n")
    return folder


def test_accuracies_are_those_of_the_models_that_stay(
    model_folder: Callable[[str], Path], files: Path, tmp_path: Path
) -> None:
    """Dense and pruned, scored by themselves; and no signs of life are missing."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from secateur import zero_shot

    source, out = model_folder("llama-gqa-tied"), tmp_path / "out"
    ended = secateur(
        "compare", source, "--methods", "magnitude-sp", "--remove", "20%", "--samples", 2,
        "--length", 16, "--windows", 1, "--window-length", 24, "--tasks", "piqa,sciq", "--limit", 5,
        "--data-dir", files, "--keep", "--out", out,
    )  # fmt: skip
    ended.fine()
    found = load(out)
    name = "magnitude-sp-20-seed0"
    for cell, model in zip(found["cells"], (source, out / "models" / name), strict=True):
        scores = zero_shot(model, ["piqa", "sciq"], limit=5, data_dir=files)
        for score in scores:
            assert cell["measures"][f"acc {score.task}"] == score.acc
            assert cell["measures"][f"acc_norm {score.task}"] == score.acc_norm
            assert cell["scores"][score.task]["acc_error"] == score.acc_error
            assert (score.items, score.of) == (5, 6)
        assert cell["measures"]["acc mean"] == sum(s.acc for s in scores) / 2
    for task in ("piqa", "sciq"):
        assert any(f"dense: zero-shot {task} " in line for line in ended.err), ended.err
        assert any(f"20% of all: zero-shot {task} " in line for line in ended.err)
    assert "boolq" not in ended.out
    assert "sciq acc_norm, %" in ended.out
