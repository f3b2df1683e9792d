"""Cells, the folder that remembers them, the table: without a model, by a stand-in for the worker.

``test_compare.py`` does the same with real processes and models.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from commands import secateur
from stand_in import GRID, LOOK, StandIn, load, pruned

from secateur.comparison import run
from secateur.comparison.cells import make_cells
from secateur.comparison.folder import Folder, differences
from secateur.comparison.run import compare
from secateur.comparison.table import Row
from secateur.errors import OutputError, RecipeError, SourceError
from secateur.executors import Executor

# ---- cells -------------------------------------------------------------------------------------


def test_a_whole_grid_for_the_first_seed_comes_first() -> None:
    cells = make_cells(methods=["comp", "obs"], remove=["10%", "20%"], seeds=[3, 1])
    assert [cell.name for cell in cells] == [
        "comp-10-seed3", "obs-10-seed3", "comp-20-seed3", "obs-20-seed3",
        "comp-10-seed1", "obs-10-seed1", "comp-20-seed1", "obs-20-seed1",
    ]  # fmt: skip
    assert cells[0].asked == "10% of all"
    assert cells[0].recipe.seed == 3


def test_names_say_what_is_asked(tmp_path: Path) -> None:
    (of_decoder,) = make_cells(methods=["comp"], remove=["12.5%"], of="decoder")
    assert (of_decoder.name, of_decoder.asked) == (
        "comp-12.5-of-decoder-seed0",
        "12.5% of the decoder",
    )
    file = tmp_path / "my own.yaml"
    file.write_text("params: 5.4B\nseed: 7\n")
    (of_recipe,) = make_cells(recipes=[file])
    assert (of_recipe.name, of_recipe.asked) == (
        "my-own-5.4B-parameters-left-seed7",
        "5.4B parameters left",
    )


def test_recipes_are_rows_and_options_win_over_them(tmp_path: Path) -> None:
    for name, order in (("a", "condition"), ("b", "energy")):
        (tmp_path / f"{name}.yaml").write_text(
            f"remove: 50%\nseed: 4\noptions: {{order: {order}, grid: 8}}\n"
            "calibration: {samples: 3, length: 16}\n"
        )
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    cells = make_cells(recipes=files)
    assert [(c.label, c.asked, c.recipe.seed) for c in cells] == [
        ("a", "50% of all", 4),
        ("b", "50% of all", 4),
    ]
    cells = make_cells(
        methods=["obs"], recipes=files, remove=["10%"], seeds=[0],
        options={"comp.grid": 16, "layers": 0}, calibration={"length": 32},
    )  # fmt: skip
    assert [c.recipe.options for c in cells] == [
        {"layers": 0},
        {"layers": 0, "grid": 16, "order": "condition"},
        {"layers": 0, "grid": 16, "order": "energy"},
    ]
    assert [(c.recipe.calibration.samples, c.recipe.calibration.length) for c in cells] == [
        (10, 32), (3, 32), (3, 32),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {},
            "there is nothing to compare: name methods with --methods comp,obs, or recipe files "
            "with --recipes a.yaml,b.yaml",
        ),
        ({"methods": ["comp"]}, "--methods needs shares to remove: give --remove 10%,20%,30%"),
        (
            {"methods": ["comp"], "remove": ["10%"], "seed": 1},
            "a comparison takes seeds, a list, and not seed",
        ),
        (
            {"methods": ["comp"], "remove": ["10"]},
            "remove is '10': is it 10% or 10 parameters? Write --remove 20% for a share, or "
            "--params 100M for what is to be left",
        ),
        (
            {"methods": ["comp"], "remove": ["10%"], "options": {"obs.steps": 9}},
            "--set obs.steps is for method obs, which is not compared: methods here are comp",
        ),
        (
            {"methods": ["comp"], "remove": ["10%"], "depth": 3},
            "recipe field depth is not known: allowed are remove, params, size, "
            "sparsity, of, method, options, then, then_options, calibration, structure, layout, "
            "round_to, seed, dtype",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_runs(given: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError) as refused:
        make_cells(**given)
    assert str(refused.value) == text


def test_unknown_methods_and_options_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^method graft is not known: choose one of .*comp"):
        make_cells(methods=["comp", "graft"], remove=["10%"])
    with pytest.raises(RecipeError, match=r"^option of method obs order is not known: allowed"):
        make_cells(methods=["obs"], remove=["10%"], options={"order": "energy"})
    file = tmp_path / "a.yaml"
    file.write_text("remove: 10%\nmethod: obs\noptions: {order: energy}\n")
    with pytest.raises(RecipeError) as refused:
        make_cells(recipes=[file])
    assert str(refused.value).startswith(f"recipe {file}: option of method obs order is not known")


def test_two_rows_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "comp.yaml"
    file.write_text("method: comp\n")
    with pytest.raises(RecipeError) as refused:
        make_cells(methods=["comp"], recipes=[file], remove=["20%"])
    assert str(refused.value) == (
        "two rows would be called comp at 20% of all: give the recipe files names of their own, "
        "which are the names of the rows"
    )


def test_seeds_are_numbers() -> None:
    secateur(
        "compare", "m", "--out", "o", "--methods", "comp", "--remove", "9%", "--seeds", "0,x"
    ).refused_at_once("--seeds is '0,x': write whole numbers with commas between them, such as "
                      "0,1,2")  # fmt: skip


# ---- the table -----------------------------------------------------------------------------------


def test_the_table_holds_what_was_measured(stand_in: type[StandIn], tmp_path: Path) -> None:
    found = compare("model", tmp_path / "out", **GRID)
    rows = [(row.label, row.asked, row.texts(found.table.columns)) for row in found.table.rows]
    assert [column.title for column in found.table.columns] == [
        "removed of all, %", "of the decoder, %", "perplexity, builtin", "perplexity, wikitext2",
        "to prune, s", "peak memory, MiB",
    ]  # fmt: skip
    assert rows == [
        ("dense", "", ["0.00", "0.00", "20.00", "30.00", "", ""]),
        ("comp", "10% of all", ["6.00", "10.00", "40.00", "60.00", "1", "100"]),
        ("obs", "10% of all", ["6.00", "10.00", "60.00", "90.00", "1", "100"]),
        ("comp", "20% of all", ["12.00", "20.00", "60.00", "90.00", "2", "100"]),
        ("obs", "20% of all", ["12.00", "20.00", "100.00", "150.00", "2", "100"]),
    ]
    assert found.failed == {}
    assert found.notes == []
    assert not (tmp_path / "out" / "work").exists()
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "\n| comp | 10% of all | 6.00 | 10.00 | 40.00 | 60.00 | 1 | 100 |\n" in text
    assert (
        "\n- Perplexity on wikitext2 (somewhere): 4 windows of 11 tokens, 40 predictions, float32."
        in text
    )
    assert "\n- Calibration: 10 windows of 128 tokens of builtin.\n" in text


def test_seeds_are_put_together(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare("model", out, methods=["comp"], remove=["10%"], seeds=[0, 1, 4])
    _, row = load(out)["rows"]
    # 20 * (1 + 10 / 10 + seed / 10) over the seeds 0, 1 and 4
    assert row["values"]["perplexity builtin"] == {
        "median": pytest.approx(42), "low": pytest.approx(40), "high": pytest.approx(48),
    }  # fmt: skip
    assert row["seeds"] == [0, 1, 4]
    text = (out / "compare.md").read_text()
    assert "| 42.00 (40.00–48.00) | 2 (1–5) | 101 (100–104) |" in text
    assert "Medians over the seeds 0, 1, 4, with the smallest and the largest value" in text


def test_csv_has_a_line_for_each_cell_with_numbers_in_full(
    stand_in: type[StandIn], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stand_in.failing = {"comp-20-seed1": OutputError('a reason, with "quotes"')}
    compare("model", out, methods=["comp"], remove=["10%", "20%"], seeds=[0, 1])
    lines = list(csv.DictReader(io.StringIO((out / "compare.csv").read_text())))
    assert [(line["setting"], line["asked"], line["seed"]) for line in lines] == [
        ("dense", "", ""),
        ("comp", "10% of all", "0"), ("comp", "10% of all", "1"),
        ("comp", "20% of all", "0"), ("comp", "20% of all", "1"),
    ]  # fmt: skip
    assert float(lines[2]["peak_memory"]) == 101 * 2**20
    assert float(lines[2]["share_removed"]) == 0.1 * 0.6
    assert math.isclose(float(lines[2]["perplexity builtin"]), 42)
    assert lines[4]["failed"] == 'a reason, with "quotes"'
    assert lines[4]["seconds"] == ""


def test_a_cell_that_fails_is_a_row_and_the_others_go_on(
    stand_in: type[StandIn], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stand_in.failing = {"comp-10-seed0": SourceError("block 3\nis | broken")}
    found = compare("model", out, **GRID)
    assert found.failed == {"comp-10-seed0": "block 3 is | broken"}
    assert len(pruned(stand_in)) == 4
    row = found.table.rows[1]
    assert (row.texts(found.table.columns), row.remarks()) == (
        [""] * 6,
        ["failed: block 3 is | broken"],
    )
    text = (out / "compare.md").read_text()
    assert "\n- comp, 10% of all: failed: block 3 is | broken\n" in text


def test_a_seed_that_fails_leaves_the_others_their_row(
    stand_in: type[StandIn], tmp_path: Path
) -> None:
    stand_in.failing = {"comp-10-seed1": OutputError("no room")}
    found = compare("model", tmp_path / "out", methods=["comp"], remove=["10%"], seeds=[0, 1])
    row = found.table.rows[1]
    assert row.seeds == (0,)
    assert row.texts(found.table.columns)[2] == "40.00"
    assert row.remarks() == ["seed 1 failed: no room"]


def test_the_exit_code_tells_of_failed_cells(stand_in: type[StandIn], tmp_path: Path) -> None:
    words = ("compare", "model", "--methods", "comp", "--remove", "10%,20%", "--out")
    assert secateur(*words, tmp_path / "fine").code == 0
    stand_in.failing = {"comp-20-seed0": OutputError("no room")}
    ended = secateur(*words, tmp_path / "half")
    assert ended.code == 1
    assert "comp, 20% of all: failed: no room" in ended.out.splitlines()
    assert ended.err[-1] == "[2/2] comp, 20% of all  seed 0  failed: no room"


def test_seeds_that_fail_alike_share_a_remark() -> None:
    row = Row("a", "9%", (3,), failed={0: "no room", 1: "broken", 2: "no room"}, waiting=(4, 5))
    assert row.remarks() == [
        "seeds 0, 2 failed: no room",
        "seed 1 failed: broken",
        "seeds 4, 5 not run yet",
    ]
    assert Row("a", "9%", failed={0: "no room", 1: "no room"}).remarks() == ["failed: no room"]


# ---- going on ------------------------------------------------------------------------------------


def test_a_finished_cell_is_never_run_again(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stand_in.failing = {"obs-10-seed0": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        compare("model", out, **GRID)
    assert pruned(stand_in) == ["comp-10-seed0", "obs-10-seed0"]
    rows = load(out)["rows"]  # the tables are there from the first cell on
    assert [row["waiting"] for row in rows] == [[], [], [0], [0], [0]]
    assert "\n- obs, 10% of all: not run yet\n" in (out / "compare.md").read_text()
    stand_in.failing = {}
    stand_in.asked.clear()
    compare("model", out, **GRID)
    assert pruned(stand_in) == ["obs-10-seed0", "comp-20-seed0", "obs-20-seed0"]
    assert ("evaluate", "model") not in stand_in.asked
    stand_in.asked.clear()
    before = (out / "compare.json").read_bytes()
    compare("model", out, **GRID)
    assert stand_in.asked == []
    assert (out / "compare.json").read_bytes() == before


def test_a_failed_cell_is_tried_again(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stand_in.failing = {"obs-10-seed0": OutputError("no room")}
    compare("model", out, **GRID)
    stand_in.failing = {}
    stand_in.asked.clear()
    assert compare("model", out, **GRID).failed == {}
    assert pruned(stand_in) == ["obs-10-seed0"]


def test_a_longer_command_adds_and_a_shorter_one_says_what_it_leaves_out(
    stand_in: type[StandIn], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compare("model", out, methods=["comp"], remove=["10%"])
    stand_in.asked.clear()
    compare("model", out, methods=["comp", "obs"], remove=["10%"])
    assert pruned(stand_in) == ["obs-10-seed0"]
    found = compare("model", out, methods=["obs"], remove=["10%"])
    assert [row.label for row in found.table.rows] == ["dense", "obs"]
    assert found.notes == [
        "not in this table are 1 cell of earlier commands; name their methods, shares and seeds "
        "too to have them in it"
    ]


def test_other_conditions_are_refused(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare("model", out, **GRID)
    stand_in.asked.clear()
    with pytest.raises(OutputError) as refused:
        compare("model", out, **{**GRID, "window_length": 12})
    assert str(refused.value) == (
        f"{out} holds cells that were measured otherwise (different: evaluation.builtin.length, "
        "evaluation.builtin.predictions, evaluation.builtin.tokens_sha256, "
        "evaluation.wikitext2.length, evaluation.wikitext2.predictions, "
        "evaluation.wikitext2.tokens_sha256): repeat that command, choose another --out, or "
        f"remove the folder with rm -r {out}"
    )
    stand_in.look = {**LOOK, "versions": {"secateur": "0", "torch": "2"}}
    with pytest.raises(OutputError, match=r"\(different: versions.torch\)"):
        compare("model", out, **GRID)
    assert stand_in.asked == []


def test_the_dense_model_alone_holds_nobody(stand_in: type[StandIn], tmp_path: Path) -> None:
    """As long as no cell is measured, the command may still be mended."""
    out = tmp_path / "out"
    stand_in.failing = {"comp-10-seed0": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        compare("model", out, **GRID)
    stand_in.failing = {}
    stand_in.asked.clear()
    compare("model", out, **{**GRID, "window_length": 12})
    assert stand_in.asked[0] == ("evaluate", "model")


def test_another_recipe_of_a_finished_cell_is_refused(
    stand_in: type[StandIn], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compare("model", out, **GRID)
    stand_in.asked.clear()
    with pytest.raises(OutputError) as refused:
        compare("model", out, **GRID, calibration={"samples": 64}, options={"comp.grid": 8})
    assert str(refused.value) == (
        f"{out} holds the cell comp-10-seed0, measured with another recipe (different: "
        "calibration.samples, options.grid): repeat that command, choose another --out, or remove "
        f"{out}/cells/comp-10-seed0.json"
    )
    assert stand_in.asked == []


def test_a_model_that_was_pruned_is_only_evaluated(
    stand_in: type[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two: the long part is not done again, and its numbers are kept."""
    out = tmp_path / "out"
    real = StandIn.do_evaluate

    def killed(self: StandIn, model: str, **given: Any) -> Any:
        if model.endswith("comp-10-seed0"):
            raise KeyboardInterrupt
        return real(self, model, **given)

    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "do_evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            compare("model", out, methods=["comp"], remove=["10%"])
    assert (out / "work" / "comp-10-seed0").is_dir()
    stand_in.asked.clear()
    compare("model", out, methods=["comp"], remove=["10%"])
    assert stand_in.asked == [("evaluate", "comp-10-seed0")]
    assert load(out)["cells"][1]["measures"]["seconds"] == 1.0
    assert not (out / "work").exists()


def test_time_and_memory_of_a_killed_run_are_added(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = out / "work" / "comp-10-seed0.partial"
    compare("model", out, methods=["obs"], remove=["10%"])
    work.mkdir(parents=True)
    (out / "work" / "comp-10-seed0.json").write_text(
        json.dumps({"seconds": 30.5, "peak_memory": 700 * 2**20})
    )
    (work / "journal.jsonl").write_text('{"kind": "identity"}\n{"kind": "layers"}\n')
    found = compare("model", out, methods=["comp"], remove=["10%"])
    (cell,) = [cell for cell in found.table.cells if cell["label"] == "comp"]
    assert cell["measures"]["seconds"] == 31.5
    assert cell["measures"]["peak_memory"] == 700 * 2**20
    assert cell["continued"]
    assert (
        "\n- Interrupted and continued, with the seconds of all parts: comp-10-seed0.\n"
        in (out / "compare.md").read_text()
    )


def test_work_that_prune_does_not_go_on_from_is_not_counted(
    stand_in: type[StandIn], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compare("model", out, methods=["obs"], remove=["10%"])
    (out / "work").mkdir()
    (out / "work" / "comp-10-seed0.json").write_text('{"seconds": 30.5, "peak_memory": 1}')
    found = compare("model", out, methods=["comp"], remove=["10%"])
    (cell,) = [cell for cell in found.table.cells if cell["label"] == "comp"]
    assert cell["measures"]["seconds"] == 1.0
    assert not cell["continued"]


def test_time_left_goes_by_finished_cells(stand_in: type[StandIn], tmp_path: Path) -> None:
    cells = make_cells(methods=["comp", "obs"], remove=["1%", "2%", "3%"])
    with Folder(tmp_path / "out", tmp_path / "model") as folder:
        measuring = run.Measuring("model", folder, reading={})
        state = run._Run(folder, cells, measuring, run.Progress(), executor=None)
        assert state.seconds_left() is None
        state.results["comp-1-seed0"] = {"wall": 10.0}
        assert state.seconds_left() == 50.0  # five cells like the only one known
        state.results["obs-1-seed0"] = {"wall": 40.0}
        state.results["comp-2-seed0"] = {"wall": 20.0}
        assert state.seconds_left() == 15 + 2 * 40  # one more of comp, two of obs
        state.results["comp-3-seed0"] = {"failed": "no"}
        assert state.seconds_left() == 80


# ---- the folder ----------------------------------------------------------------------------------


def test_models_stay_with_keep(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = compare("model", out, methods=["comp"], remove=["10%"])
    assert not (out / "models").exists()
    found = compare("model", out, methods=["comp"], remove=["10%", "20%"], keep=True)
    assert [path.name for path in (out / "models").iterdir()] == ["comp-20-seed0"]
    assert first.notes == []
    assert found.notes == [
        "measured before --keep was given, and so not there: 1 model; secateur prune model "
        f"--recipe {out}/recipes/comp-10-seed0.yaml --out FOLDER makes the first of them"
    ]


def test_the_recipe_of_each_cell_makes_the_same_recipe(
    stand_in: type[StandIn], tmp_path: Path
) -> None:
    from secateur.recipe import load_recipe

    out = tmp_path / "out"
    compare("model", out, methods=["comp"], remove=["10%"], of="decoder", options={"layers": 0})
    (cell,) = make_cells(methods=["comp"], remove=["10%"], of="decoder", options={"layers": 0})
    assert load_recipe(out / "recipes" / "comp-10-of-decoder-seed0.yaml") == cell.recipe


def test_a_folder_of_somebody_else_is_left_alone(stand_in: type[StandIn], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError) as refused:
        compare("model", tmp_path, **GRID)
    assert str(refused.value) == (
        f"output {tmp_path} exists and is not empty: choose another --out, or remove it first"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_one_process_at_a_time(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Folder(out, tmp_path / "model"), pytest.raises(OutputError) as refused:
        compare("model", out, **GRID)
    assert str(refused.value) == (
        f"output {out} is being written by another process: wait for it, or choose another --out"
    )
    compare("model", out, **GRID)  # the lock went with its holder


def test_a_damaged_cell_is_named(stand_in: type[StandIn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare("model", out, **GRID)
    cell = out / "cells" / "comp-10-seed0.json"
    cell.write_text("{")
    with pytest.raises(OutputError) as refused:
        compare("model", out, **GRID)
    assert str(refused.value) == (
        f"{cell} is not JSON any more (Expecting property name enclosed in double quotes: line 1 "
        "column 2 (char 1)): remove it"
    )


def test_differences_are_named_by_their_path() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": 0}, "e": {}}
    assert differences(old, old) == []
    assert differences(old, {"a": 2, "b": {"c": [1, 3], "d": 0}, "f": 1}) == ["a", "b.c", "e", "f"]


# ---- side by side ------------------------------------------------------------------------------


class Closing(StandIn):
    """What an executor starts is also closed by it."""

    def close(self) -> None:
        pass


class Beside(Executor):
    """Two cells at a time."""

    workers = 2
    threads = 1

    def _start(self, module: str, what: str) -> Closing:
        return Closing(module, what)


def test_cells_side_by_side_make_the_same_table(
    stand_in: type[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.failing = {"obs-20-seed0": SourceError("block 1 cannot be cut")}
    compare("model", tmp_path / "serial", **GRID)
    one_by_one, stand_in.asked = stand_in.asked, []
    monkeypatch.setattr(run, "opened_executor", lambda *_: Beside())
    found = compare("model", tmp_path / "beside", workers=2, **GRID)
    assert sorted(stand_in.asked) == sorted(one_by_one)
    assert found.failed == {"obs-20-seed0": "block 1 cannot be cut"}
    both = [without_times(load(tmp_path / name)) for name in ("serial", "beside")]
    assert both[0] == both[1]


def test_cells_side_by_side_continue(
    stand_in: type[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell that raised no error of ours ends all; what was finished is not made again."""
    monkeypatch.setattr(run, "opened_executor", lambda *_: Beside())
    stand_in.failing = {"obs-20-seed0": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        compare("model", tmp_path / "out", workers=2, **GRID)
    finished = {path.stem for path in (tmp_path / "out" / "cells").iterdir()} - {"dense"}
    stand_in.failing, stand_in.asked = {}, []
    compare("model", tmp_path / "out", workers=2, **GRID)
    assert "obs-20-seed0" not in finished
    assert set(pruned(stand_in)) == {"comp-10-seed0", "obs-10-seed0", "comp-20-seed0",
                                     "obs-20-seed0"} - finished  # fmt: skip


def without_times(value: Any) -> Any:
    """A tree of JSON without what depends on the clock."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k != "wall"}
    return [without_times(each) for each in value] if isinstance(value, list) else value
