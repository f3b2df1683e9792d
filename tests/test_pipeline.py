"""From a source and a recipe to what was asked for: shares, seeds, plans, refusals."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from secateur import pipeline
from secateur.calibration import draw_windows, load_text
from secateur.checkpoint import open_checkpoint
from secateur.checkpoint.safetensors_folder import read_header
from secateur.errors import CalibrationError, OutputError, RecipeError, SourceError
from secateur.pipeline import make_plan
from secateur.plans import Plan
from secateur.pruning import RECORD, prune
from secateur.recipe import Recipe, make_recipe

Folder = Callable[[str], Path]
SHORT = {"samples": 4, "length": 24}
EVERYWHERE = {"exempt_first": 0, "exempt_last": 0, "grid": 8}  # a coarse grid is quick


def recipe(remove: str = "20%", of: str = "decoder", **fields: Any) -> Recipe:
    options = {"layers": 0, "denses": "all", **EVERYWHERE, **fields.pop("options", {})}
    return make_recipe(
        **{
            "remove": remove,
            "of": of,
            "method": "comp",
            "options": options,
            "calibration": SHORT,
            **fields,
        }
    )


def same_plans(one: Plan, two: Plan) -> bool:
    if one.kept_layers != two.kept_layers:
        return False
    for a, b in zip(one.blocks, two.blocks, strict=True):
        left, right = a.tensors(), b.tensors()
        if left.keys() != right.keys() or a.notes != b.notes:
            return False
        if not all(torch.equal(left[name], right[name]) for name in left):
            return False
    return True


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
    }


# ---- shares ----------------------------------------------------------------------------------


def neuron_of(name: str) -> int:
    """Parameters of one FFN neuron of a tiny model, the largest unit that is cut."""
    return 2 * 32 + 1 if name.startswith("opt") else 3 * 32 + 2


def check_share(name: str, share: str, denses: str, folder: Path) -> None:
    """Within 0.2 points; each of these small blocks may be off by half a unit, though."""
    result = make_plan(folder, recipe(share, options={"denses": denses}))
    before, after = result.plan.sizes_before(), result.plan.sizes()
    assert result.asked == round(float(share[:-1]) / 100 * before.decoder)
    reached = before.decoder - after.decoder
    assert reached == before.parameters - after.parameters
    grain = len(result.plan.blocks) * (neuron_of(name) / 2 + 1)
    assert abs(reached - result.asked) <= max(0.002 * before.decoder, grain)


@pytest.mark.parametrize("share", ["10%", "20%", "30%"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_share_is_reached(name: str, share: str, model_folder: Folder) -> None:
    check_share(name, share, "all", model_folder(name))


@pytest.mark.parametrize("share", ["10%", "20%", "30%"])
@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt-project"])
@pytest.mark.parametrize("denses", ["neurons", "outputs"])
def test_the_share_is_reached_whatever_is_cut(
    name: str, share: str, denses: str, model_folder: Folder
) -> None:
    check_share(name, share, denses, model_folder(name))


@pytest.mark.parametrize("share", ["10%", "20%", "30%"])
@pytest.mark.parametrize("denses", ["neurons", "outputs", "all"])
def test_the_share_is_reached_within_two_tenths_of_a_point(
    denses: str, share: str, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With enough neurons in a block, one of them is little beside it."""
    wide = ("llama", {"num_key_value_heads": 2, "intermediate_size": 512})
    monkeypatch.setitem(tiny.MODELS, "wide", wide)
    result = make_plan(model_folder("wide"), recipe(share, options={"denses": denses}))
    before, after = result.plan.sizes_before(), result.plan.sizes()
    assert after.decoder_share_removed(before) == pytest.approx(float(share[:-1]) / 100, abs=0.002)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["mistral", "opt"])
def test_removed_blocks_count_towards_the_share(
    name: str, layers: int, model_folder: Folder
) -> None:
    result = make_plan(model_folder(name), recipe("60%", options={"layers": layers}))
    before, after = result.plan.sizes_before(), result.plan.sizes()
    assert len(result.plan.removed_layers) == layers
    assert after.decoder_share_removed(before) == pytest.approx(0.6, abs=0.002)


def test_a_share_of_the_model_is_of_all_parameters(model_folder: Folder) -> None:
    result = make_plan(model_folder("llama-mha-untied"), recipe("10%", of="model"))
    before, after = result.plan.sizes_before(), result.plan.sizes()
    assert after.share_removed(before) == pytest.approx(0.1, abs=0.002)
    assert after.decoder_share_removed(before) > 0.13


@pytest.mark.parametrize(
    ("target", "left"),
    [
        ({"params": "40K"}, 40_000),
        ({"params": "35200"}, 35_200),
        ({"params": "0.04M"}, 40_000),
        ({"size": "160KB"}, 40_000),
        ({"size": "150KiB"}, 150 * 1024 // 4),
        ({"size": "80KB", "dtype": "float16"}, 40_000),
    ],
)
def test_targets_in_parameters_and_bytes(
    target: dict[str, str], left: int, model_folder: Folder
) -> None:
    result = make_plan(model_folder("opt"), recipe(None, "model", **target))  # type: ignore[arg-type]
    before, after = result.plan.sizes_before(), result.plan.sizes()
    assert result.asked == before.parameters - left
    assert abs(after.parameters - left) <= 0.002 * before.parameters
    each = 2 if target.get("dtype") == "float16" else 4
    assert result.bytes_written == each * after.parameters


def test_a_size_is_reached_on_disk(model_folder: Folder, tmp_path: Path) -> None:
    made = recipe(None, "model", size="80KB", dtype="bfloat16")  # type: ignore[arg-type]
    out = prune(model_folder("opt"), tmp_path / "out", made, verify=False).out
    stored = [t for p in out.glob("model-*.safetensors") for t in read_header(p).values()]
    # Indices of gathers come on top of the weights.
    weights = sum(t.nbytes for t in stored if not t.name.endswith("_index"))
    assert weights == pytest.approx(80_000, rel=0.003)


# ---- seeds and data --------------------------------------------------------------------------


def test_a_seed_draws_other_data(model_folder: Folder) -> None:
    source = model_folder("llama-gqa-tied")
    tokenizer = open_checkpoint(source).tokenizer
    text = load_text("builtin", use="calibration")
    hashes = [
        draw_windows(text, tokenizer, samples=4, length=24, seed=seed).sha256 for seed in (0, 1, 0)
    ]
    assert hashes[0] == hashes[2] != hashes[1]
    plans = [make_plan(source, recipe(seed=seed)).plan for seed in (0, 1, 0)]
    assert same_plans(plans[0], plans[2])
    assert not same_plans(plans[0], plans[1])


def test_the_seed_reaches_what_is_drawn_inside_blocks(model_folder: Folder, tmp_path: Path) -> None:
    """With data that leaves nothing to draw, only a random order depends on the seed."""
    text = tmp_path / "text.txt"
    text.write_text("In winter the old wood is cut. " * 8)  # 31 bytes, each a token
    fixed = {"source": str(text), "samples": 8, "length": 31}
    source = model_folder("qwen3")

    def plan_of(order: str, seed: int) -> Plan:
        made = recipe(seed=seed, calibration=fixed, options={"order": order})
        return make_plan(source, made).plan

    assert same_plans(plan_of("condition", 0), plan_of("condition", 7))
    assert same_plans(plan_of("random", 7), plan_of("random", 7))
    assert not same_plans(plan_of("random", 0), plan_of("random", 7))


def test_the_record_names_the_data(model_folder: Folder, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    rows = [{"body": f"{i}: the gardener cuts above the {i}th bud"} for i in range(30)]
    text.write_text("\n".join(json.dumps(row) for row in rows))
    fixed = {"source": str(text), "samples": 3, "length": 16, "text_field": "body"}
    result = prune(
        model_folder("opt"), tmp_path / "out", recipe(seed=5, calibration=fixed), verify=False
    )
    record = json.loads((result.out / RECORD).read_text())
    windows = draw_windows(
        load_text(str(text), use="calibration", text_field="body"),
        open_checkpoint(model_folder("opt")).tokenizer,
        samples=3,
        length=16,
        seed=5,
    )
    assert record["calibration"] == {"origin": "text.jsonl", "sha256": windows.sha256}
    assert record["recipe"]["seed"] == 5


# ---- plan and prune --------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["identical", "sequential"])
@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt"])
def test_a_plan_writes_nothing_and_is_what_prune_does(
    name: str, inputs: str, model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_folder(name)
    monkeypatch.chdir(tmp_path)
    made = recipe("40%", options={"layers": "auto", "max_layers": 2, "inputs": inputs})
    before = tree(source)
    planned = make_plan(source, made)
    assert tree(source) == before
    assert not list(tmp_path.iterdir())
    pruned = prune(source, tmp_path / "out", made, verify=False)
    assert tree(source) == before
    assert same_plans(planned.plan, pruned.plan)
    assert planned.trials == pruned.trials
    assert planned.choice == pruned.choice
    assert planned.asked == pruned.asked


def test_tried_numbers_of_blocks_are_recorded(model_folder: Folder, tmp_path: Path) -> None:
    made = recipe("55%", options={"layers": "auto", "max_layers": 2})
    result = prune(model_folder("llama-mha-untied"), tmp_path / "out", made, verify=False)
    stage = json.loads((result.out / RECORD).read_text())["layer_stage"]
    assert stage["trials"] == result.trials
    counts = [trial["layers"] for trial in result.trials]
    assert counts == list(range(len(counts)))
    losses = [trial["held_out_loss"] for trial in result.trials]
    assert len(losses) >= 2
    # Upwards until one is not clearly better; that one is not taken.
    taken = len(result.plan.removed_layers)
    assert taken == len(losses) - 1 == 2 or taken == len(losses) - 2
    assert losses[: taken + 1] == sorted(losses[: taken + 1], reverse=True)
    assert result.choice.held_out_loss == pytest.approx(losses[taken], abs=1e-6)
    assert stage["removed_in_order"] == result.choice.removed
    assert sorted(map(int, stage["importances"])) == result.plan.kept_layers


def test_a_number_of_blocks_needs_no_trial(model_folder: Folder) -> None:
    result = make_plan(model_folder("opt"), recipe("40%", options={"layers": 1}))
    assert result.trials == []
    assert result.choice.held_out_loss is None


def test_what_it_took_is_told(model_folder: Folder) -> None:
    result = make_plan(model_folder("opt"), recipe())
    assert set(result.seconds) >= {"layer stage, 0 removed", "cutting blocks"}
    assert all(seconds >= 0 for seconds in result.seconds.values())
    assert result.peak_memory > 50 * 2**20
    assert result.estimate.memory > 50 * 2**20


# ---- refusals in the middle ------------------------------------------------------------------


@pytest.mark.parametrize("touched", ["first", "last"])
def test_a_source_that_changes_under_the_run(
    touched: str, model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("qwen2"), source)
    weights = source / "model.safetensors"
    write_block = pipeline.hf.write_block
    wanted = 0 if touched == "first" else 3

    def touching(*args: Any, **settings: Any) -> str:
        if settings["number"] == wanted:
            os.utime(weights, ns=(1, 1))
        return write_block(*args, **settings)

    monkeypatch.setattr(pipeline.hf, "write_block", touching)
    out = tmp_path / "out"
    with pytest.raises(SourceError, match=r"source .* changed while it was read"):
        prune(source, out, recipe(), verify=False)
    assert not out.exists()

    # What was finished is of another source now, and is not built upon.
    monkeypatch.undo()
    with pytest.raises(OutputError, match=r"another run \(different: source_files\)"):
        prune(source, out, recipe(), verify=False)
    shutil.rmtree(tmp_path / "out.partial")
    prune(source, out, recipe(), verify=False)


def test_a_source_that_changes_at_the_very_end(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embeddings are read last; a change before that is as bad as one before a block."""
    source = tmp_path / "source"
    shutil.copytree(model_folder("qwen2"), source)
    write_outside = pipeline.hf.write_outside

    def touching(*args: Any, **settings: Any) -> None:
        os.utime(source / "model.safetensors", ns=(1, 1))
        write_outside(*args, **settings)

    monkeypatch.setattr(pipeline.hf, "write_outside", touching)
    with pytest.raises(SourceError, match="changed while it was read"):
        prune(source, tmp_path / "out", recipe(), verify=False)
    assert not (tmp_path / "out").exists()


def test_only_stock_outputs_can_be_pruned_again(model_folder: Folder, tmp_path: Path) -> None:
    source = model_folder("llama-gqa-tied")
    layers = recipe("25%", options={"layers": 1})
    once = prune(source, tmp_path / "once", layers, verify=False)
    twice = prune(once.out, tmp_path / "twice", recipe("20%"), verify=False)
    assert len(twice.plan.blocks) == 3
    before, after = once.plan.sizes(), twice.plan.sizes()
    assert after.decoder_share_removed(before) == pytest.approx(0.2, abs=0.01)

    with pytest.raises(SourceError, match="different sizes in each block already: prune the orig"):
        prune(twice.out, tmp_path / "thrice", recipe("10%"), verify=False)
    with pytest.raises(SourceError, match="different sizes in each block already"):
        make_plan(twice.out, recipe("10%"))
    assert not (tmp_path / "thrice").exists()


def test_finished_output_is_not_written_over(model_folder: Folder, tmp_path: Path) -> None:
    out = prune(model_folder("opt"), tmp_path / "out", recipe(), verify=False).out
    before = tree(out)
    with pytest.raises(OutputError, match="exists and is not empty"):
        prune(model_folder("opt"), out, recipe(), verify=False)
    assert tree(out) == before


def test_an_empty_folder_may_stand_at_the_output(model_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert prune(model_folder("opt"), tmp_path / "out", recipe(), verify=False).plan.blocks


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"options": {"denses": "neurons", "exempt_first": 2, "exempt_last": 1}}, RecipeError),
        ({"options": {"layers": 3}}, RecipeError),
        ({"calibration": {"samples": 4, "length": 4000}}, RecipeError),
        ({"calibration": {"source": "nowhere.txt"}}, CalibrationError),
    ],
)
def test_what_cannot_be_had_leaves_nothing(
    change: dict[str, Any], error: type[Exception], model_folder: Folder, tmp_path: Path
) -> None:
    with pytest.raises(error):
        prune(model_folder("opt"), tmp_path / "out", recipe("30%", **change), verify=False)
    assert not list(tmp_path.iterdir())
