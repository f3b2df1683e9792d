"""Pages and pictures: every number has its place, and a page needs nothing but itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import check_alone

from secateur.estimate import Estimate
from secateur.pruning import PruneResult, prune
from secateur.recipe import make_recipe
from secateur.report import charts
from secateur.report.charts import Bar, Point, Series, Stripe
from secateur.report.pruning import pruning_page, write_pruning_page
from secateur.report.scales import linear, logarithmic


@pytest.fixture(scope="module")
def made(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> PruneResult:
    out = tmp_path_factory.mktemp("report") / "smaller & cut"
    recipe = make_recipe(
        remove="40%",
        of="decoder",
        method="comp",
        options={"layers": 1, "exempt_first": 0, "exempt_last": 0},
        calibration={"samples": 2, "length": 16},
    )
    return prune(model_folder("llama-gqa-tied"), out, recipe, verify=False)


# ---- the page of a pruned model ------------------------------------------------------------------


def test_every_pruned_folder_has_a_page(made: PruneResult) -> None:
    page = check_alone((made.out / "report.html").read_text())
    record = json.loads((made.out / "secateur.json").read_text())
    before, after = record["plan"]["parameters"].values()
    decoder = record["plan"]["decoder_parameters"]
    sizes = {row[0]: row[1:] for row in page.tables["sizes"]}
    share = f"{1 - min(before, after) / max(before, after):.2%}"
    assert sizes["parameters"] == [f"{max(before, after):,}", f"{min(before, after):,}", share]
    assert sizes["in decoder blocks"][:2] == [f"{decoder['before']:,}", f"{decoder['after']:,}"]
    assert sizes["weights at 32 bits, MB"][0] == f"{max(before, after) * 4 / 1e6:.1f}"
    removed = record["plan"]["removed_layers"]
    assert sizes["blocks"] == ["4", "3", f"1 ({removed[0]})"]
    asked, reached = (record[k]["parameters_removed"] for k in ("asked", "reached"))
    said = " ".join(" ".join(page.texts["p"]).split())
    off = f"{(reached - asked) / max(before, after):+.2%}"
    assert f"Asked was the removal of {asked:,} parameters (40% of the decoder), " in said
    assert f"reached were {reached:,} ({off} of the model)." in said
    assert "2 windows of 16 tokens of built-in passages, seed 0." in said
    for program, number in record["versions"].items():
        assert f"{program} {number}" in said


def test_it_shows_every_block(made: PruneResult) -> None:
    source = (made.out / "report.html").read_text()
    record = json.loads((made.out / "secateur.json").read_text())
    for block in record["plan"]["blocks"]:
        number = block["source"]
        assert f"<title>block {number}: {block['share_removed']:.1%} removed</title>" in source
        importance = record["layer_stage"]["importances"][str(number)]
        assert f"<title>importance: block {number}, {importance:.4f}</title>" in source
        for name, error in block.get("notes", {}).get("error", {}).items():
            assert f"<title>{name}: block {number}, {100 * error:.2f}%</title>" in source
    (gone,) = record["plan"]["removed_layers"]
    assert f"<title>block {gone}: whole removed</title>" in source


def test_its_commands_can_be_typed(made: PruneResult) -> None:
    import shlex

    page = check_alone((made.out / "report.html").read_text())
    lines = [line for block in page.texts["pre"] for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("secateur ")]
    assert ["secateur", "verify", "smaller & cut", "--against", "llama-gqa-tied"] in commands
    assert ["secateur", "export", "smaller & cut", "--out", "smaller & cut.gguf"] in commands
    code = "\n".join(next(block for block in page.texts["pre"] if "import" in block).splitlines())
    compile(code, "page", "exec")
    assert 'from_pretrained("smaller & cut", trust_remote_code=True)' in code


def test_only_one_section_is_not_the_same_each_time(made: PruneResult) -> None:
    """Time and memory stand in one place; all else comes from secateur.json."""
    assert made.facts is not None
    record = json.loads((made.out / "secateur.json").read_text())
    other = replace(
        made.facts,
        seconds={"cutting blocks": 1234.5},
        peak_memory=987 * 2**20,
        continued=True,
        estimate=Estimate({"program": 55 * 2**20}, 1.0),
    )
    first, second = (
        re.sub(r'<section id="run">.*?</section>', "", pruning_page(record, facts), flags=re.S)
        for facts in (made.facts, other)
    )
    assert first == second
    whole = pruning_page(record, other)
    for text in ("1,234.5 s", "987 MiB", "55 MiB", "was interrupted and continued"):
        assert text in whole, text


def test_perplexities_stand_on_it_where_they_are_known(made: PruneResult) -> None:
    assert made.facts is not None
    before = (made.out / "report.html").read_text()
    assert "Not evaluated yet" in before
    facts = replace(made.facts, perplexity={"<ptb>": (10.0, 12.5)}, protocol="3 windows")
    try:
        write_pruning_page(made.out, facts)
        page = check_alone((made.out / "report.html").read_text())
        assert page.tables["perplexity"][1] == ["<ptb>", "10.00", "12.50", "1.25"]
        assert "Not evaluated yet" not in page.source
    finally:
        (made.out / "report.html").write_text(before)


def test_a_method_with_other_notes_and_no_importances_has_a_page(made: PruneResult) -> None:
    """Other methods leave out what they do not know."""
    assert made.facts is not None
    record = json.loads((made.out / "secateur.json").read_text())
    record["layer_stage"]["importances"] = {}
    record["layer_stage"]["trials"] = [
        {"layers": 0, "held_out_loss": 1e4},
        {"layers": 1, "held_out_loss": float("nan")},
    ]
    for notes in ({}, {"error": 0.5}, {"error": {"mlp.down_proj": float("nan"), "other": "x"}}):
        for block in record["plan"]["blocks"]:
            block["notes"] = notes
        page = check_alone(pruning_page(record, made.facts))
        assert "Squared error" not in page.source
        assert "What a block changes" not in page.source
        assert "held-out" not in page.source


# ---- scales and pictures -------------------------------------------------------------------------


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9), st.booleans())
def test_scales_hold_their_values(values: list[float], log: bool) -> None:
    scale = logarithmic(values, 300, 20) if log else linear(values, 300, 20, zero=True)
    room = 0.06 * 280 / max(1, len(scale.ticks) - 1)  # a twentieth of a step may stick out
    for value in values:
        assert 20 - room - 0.1 <= scale.at(value) <= 300 + room + 0.1
    places = [place for place, _ in scale.texts()]
    assert places == sorted(places, reverse=True)
    texts = [text for _, text in scale.texts()]
    assert len(set(texts)) == len(texts), "two marks look the same"
    assert len(texts) <= 8


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0, 30.06], ["0", "10", "20", "30"]),
        ([0, 34], ["0", "10", "20", "30", "40"]),
        ([0, 1], ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        ([0, 0], ["0.00", "0.25", "0.50", "0.75", "1.00"]),
    ],
)
def test_linear_marks(values: list[float], ticks: list[str]) -> None:
    assert [text for _, text in linear(values, 0, 100).texts()] == ticks


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([28.4, 387.6], ["50", "100", "200"]),
        ([28.4, 1021.0], ["50", "100", "200", "500", "1,000"]),
        ([462, 516], ["460", "480", "500"]),
        ([0.02, 0.7], ["0.02", "0.05", "0.1", "0.2", "0.5"]),
        ([2.0, 2.0e7], ["1", "100", "10,000", "1M"]),
    ],
)
def test_logarithmic_marks(values: list[float], ticks: list[str]) -> None:
    assert [text for _, text in logarithmic(values, 0, 100).texts()] == ticks


def test_points_lie_where_their_values_are() -> None:
    points = [Point(10, 40, 30, 50, "ten"), Point(20, 80, note="<twenty>")]
    svg = charts.line_chart([Series("comp", points)], x_title="x", y_title="y", y_zero=True)
    ys = linear([40, 30, 50, 80], 280 - charts.BOTTOM, charts.TOP, zero=True)
    xs = linear([10, 20], charts.LEFT, charts.WIDTH - charts.RIGHT, zero=True)
    assert f'<circle cx="{xs.at(10)}" cy="{ys.at(40)}"' in svg
    assert f'x1="{xs.at(10)}" x2="{xs.at(10)}" y1="{ys.at(30)}" y2="{ys.at(50)}"' in svg
    assert "<title>comp: &lt;twenty&gt;</title>" in svg


def test_a_colour_that_comes_again_has_another_mark_and_dash() -> None:
    keys = [charts.key(number) for number in range(32)]
    assert len(set(keys)) == 32


def test_series_differ_in_more_than_colour() -> None:
    keys = [charts.key(number) for number in range(4)]
    shapes = [re.sub(r"\bs\d\b", "", one) for one in keys]
    assert len(set(shapes)) == 4


def test_bars_are_as_long_as_their_values() -> None:
    svg = charts.bar_chart(
        [Bar("a", 10, "10 s"), Bar("b", 5, "5 s"), Bar("c", 0, "0 s")], title="t"
    )
    wide = [float(w) for w in re.findall(r'<rect[^>]* width="([\d.]+)"', svg)]
    assert wide[1] == pytest.approx(wide[0] / 2, abs=0.1)
    assert wide[2] == 1  # something to point at
    assert max(wide) < charts.WIDTH


def test_a_heat_map_has_a_cell_for_each_block_and_a_cross_for_a_removed_one() -> None:
    stripe = Stripe("comp 20%", [0.0, 0.25, None], ["none", "a quarter", "all"])
    svg = charts.heat_map([stripe], top=0.5, x_title="block", title="t")
    depths = re.findall(r'class="(\w+)" fill-opacity="([\d.]+)"', svg)
    assert depths == [("s0", "0.0"), ("s0", "0.5"), ("gone", "1.0")]
    assert svg.count('class="cross"') == 1


def test_long_labels_are_shortened_but_can_be_read() -> None:
    label = "a-recipe-with-a-very-long-name-indeed-and-more 20%"
    svg = charts.bar_chart([Bar(label, 1, "1")], title="t")
    shown = re.search(r'class="end"[^>]*>([^<]*)<title>', svg)
    assert shown is not None
    assert "…" in shown[1]
    assert len(shown[1]) * charts.CHARACTER <= 190
    assert f"<title>{label}</title>" in svg
