"""Recipes: fields, files, what options override, and the arithmetic of targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.methods import get_method, method_names
from secateur.recipe import (
    BYTE_UNITS,
    PARAMETER_UNITS,
    Recipe,
    load_recipe,
    make_recipe,
    parameters_to_remove,
    parse_amount,
    parse_share,
)

FULL = {
    "remove": "12.5%",
    "of": "decoder",
    "method": "comp",
    "options": {"layers": 1, "order": "energy", "tune": False},
    "calibration": {"source": "mine.jsonl", "samples": 5, "length": 64, "text_field": "body"},
    "seed": 7,
    "dtype": "bfloat16",
}


def refused(**fields: Any) -> str:
    with pytest.raises(RecipeError) as error:
        make_recipe(**fields)
    return str(error.value)


# ---- fields and files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({}, "obs"),
        ({"method": "auto"}, "obs"),
        ({"structure": "coupled"}, "obs"),
        ({"structure": "inputs"}, "comp"),
        ({"options": {"cap": 0.5, "refit": False}}, "obs"),
        ({"options": {"denses": "all"}}, "comp"),
        ({"options": {"cap": 0.5, "order": "size"}}, "comp"),
        ({"options": {"speed": 3}}, "obs"),
        ({"method": "auto", "structure": "inputs"}, "comp"),
        ({"method": "flap", "structure": "coupled"}, "flap"),
    ],
)
def test_the_method_that_auto_is(fields: dict[str, Any], method: str) -> None:
    assert make_recipe(remove="20%", **fields).method == method


def test_defaults() -> None:
    recipe = make_recipe(remove="20%")
    assert (recipe.method, recipe.of, recipe.seed, recipe.dtype) == ("obs", "model", 0, "auto")
    assert recipe.options == {}
    calibration = recipe.calibration
    assert (calibration.source, calibration.samples, calibration.length) == ("builtin", 10, 128)


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = make_recipe(**FULL)
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump()), encoding="utf-8")
    assert load_recipe(path) == recipe
    path.write_text(recipe.model_dump_json())  # JSON is YAML
    assert load_recipe(str(path)) == recipe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(FULL))
    return path


def test_options_override_the_file(file: Path) -> None:
    recipe = load_recipe(
        file, seed=1, options={"order": "obs"}, calibration={"samples": 3, "data_dir": "d"}
    )
    assert recipe.seed == 1
    assert recipe.dtype == "bfloat16"
    assert recipe.options == {"layers": 1, "order": "obs", "tune": False}
    assert recipe.calibration.model_dump() == {
        "source": "mine.jsonl", "samples": 3, "length": 64, "text_field": "body", "data_dir": "d",
    }  # fmt: skip


def test_empty_overrides_change_nothing(file: Path) -> None:
    assert load_recipe(file, options={}, calibration={}) == make_recipe(**FULL)


@pytest.mark.parametrize("target", [{"remove": "5%"}, {"params": "1M"}, {"size": "3MB"}])
def test_a_target_replaces_that_of_the_file(file: Path, target: dict[str, str]) -> None:
    recipe = load_recipe(file, of="model", **target)
    given_targets = {k: v for k in ("remove", "params", "size") if (v := getattr(recipe, k))}
    assert given_targets == target


def test_a_file_with_nothing_but_a_target(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("remove: 20%\ncalibration:\noptions:\n")
    assert load_recipe(tmp_path / "r.yaml") == make_recipe(remove="20%")


def test_recipes_of_the_repository_are_valid() -> None:
    for path in (Path(__file__).parents[1] / "recipes").glob("*.y*ml"):
        recipe = load_recipe(path)
        get_method(recipe.method, recipe.options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give exactly one of --remove, --params, --size and --sparsity, not none of them"),
        (
            {"remove": "1%", "size": "1MB", "params": "1"},
            "give exactly one of --remove, --params, --size and --sparsity, not --remove and "
            "--params and "
            "--size",
        ),
        ({"params": "1M", "of": "decoder"}, "--of decoder goes with --remove"),
        ({"remove": 20}, "recipe field remove is 20: Input should be a valid string"),
        (
            {"remove": "1%", "seeds": 1},
            "recipe field seeds is not known: allowed are remove, params, size, "
            "sparsity, of, method, options, then, then_options, calibration, structure, layout, "
            "round_to, seed, dtype",
        ),
        (
            {"remove": "1%", "calibration": {"windows": 1}},
            "recipe field calibration.windows is not known: allowed are source, samples, length, "
            "text_field, data_dir",
        ),
        (
            {"remove": "1%", "calibration": {"samples": 1}},
            "recipe field calibration.samples is 1: Input should be greater than or equal to 2",
        ),
        (
            {"remove": "1%", "calibration": {"length": 7}},
            "recipe field calibration.length is 7: Input should be greater than or equal to 8",
        ),
        ({"remove": "1%", "seed": -1}, "recipe field seed is -1: Input should be greater than or "
         "equal to 0"),
        ({"remove": "1%", "seed": 2**32}, "recipe field seed is 4294967296: Input should be less "
         "than 4294967296"),
        ({"remove": "1%", "dtype": "int8"}, "recipe field dtype is 'int8': Input should be 'auto', "
         "'float32', 'float16' or 'bfloat16'"),
        ({"remove": "1%", "options": ["a"]}, "recipe field options is ['a']: Input should be a "
         "valid dictionary"),
    ],
)  # fmt: skip
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    assert refused(**fields) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- remove: 20%", "does not consist of fields: write one a line, such as 'remove: 20%'"),
        ("", "does not consist of fields: write one a line, such as 'remove: 20%'"),
        ("20%", "does not consist of fields: write one a line, such as 'remove: 20%'"),
        ("remove: [", "cannot be read as YAML: while parsing a flow node"),
        ("seed: 2020-13-45", "cannot be read as YAML: month must be in 1..12"),
        ("remove: !!python/object:os.system x", "cannot be read as YAML: could not determine"),
        (b"\xff\xfe\xff", "cannot be read as YAML: 'utf-8' codec can't decode byte 0xff"),
        ("a: \0", "cannot be read as YAML: unacceptable character #x0000"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"recipe {path} {message}")
    assert "\n" not in str(error.value)


def test_file_with_keys_that_are_no_words(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("remove: 5%\n1: 2\n")
    with pytest.raises(RecipeError, match="recipe field 1 is not known"):
        load_recipe(tmp_path / "r.yaml")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "no.yaml")
    assert str(error.value) == f"recipe {tmp_path / 'no.yaml'} does not exist"
    with pytest.raises(RecipeError, match=r"cannot be read as YAML: .*directory"):
        load_recipe(tmp_path)


# ---- options of the method -------------------------------------------------------------------


def test_options_of_the_method() -> None:
    assert "comp" in method_names()
    options = get_method("comp", {"layers": 2, "order": "energy"}).options
    assert (options.layers, options.order) == (2, "energy")
    assert get_method("comp", {}).options.layers == "auto"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fern", {}, "method fern is not known: choose one of <*>comp, <*>obs<*>"),
        ("comp", {"speed": 1}, "option of method comp speed is not known: allowed are <*>"),
        ("comp", {"order": "size"}, "option of method comp order is 'size': Input should be "
         "'condition', <*>"),
        ("comp", {"cap": 2}, "option of method comp cap is 2: Input should be less than 1"),
        ("comp", {"layers": -1}, "option of method comp layers is -1: Input should be greater "
         "than or equal to 0, or Input should be 'auto'"),
        ("comp", {"layers": "some"}, "option of method comp layers is 'some': <*>'auto'"),
    ],
)  # fmt: skip
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    import re

    with pytest.raises(RecipeError) as error:
        get_method(name, options)
    pattern = ".*".join(re.escape(part) for part in message.split("<*>"))
    assert re.fullmatch(pattern, str(error.value))


# ---- shares and amounts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "share"), [("20%", 0.2), (" 12.5 % ", 0.125), ("+1%", 0.01), ("99.9%", 0.999)]
)
def test_share(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@settings(max_examples=100, deadline=None)
@given(st.decimals("0.0001", "99.9999", places=4))
def test_share_round_trip(percent: Any) -> None:
    assert parse_share(f"{percent}%") == pytest.approx(float(percent) / 100)


@pytest.mark.parametrize("text", ["0%", "0.0%", "100%", "-5%", "250%", "9" * 400 + "%"])
def test_share_out_of_range(text: str) -> None:
    assert refused(remove=text) == (
        f"remove is {text!r}: the share must be above 0% and below 100%"
    )


@pytest.mark.parametrize("text", ["twenty", "", "%", "20 percent", "1e1%", "nan%", "2 0%", "20%%"])
def test_share_that_is_none(text: str) -> None:
    assert refused(remove=text) == (
        f"remove is {text!r}: write a share with a percent sign, such as 20%"
    )


@pytest.mark.parametrize("text", ["20", "0.2", "-3"])
def test_share_without_sign(text: str) -> None:
    assert refused(remove=text) == (
        f"remove is {text!r}: is it {text}% or {text} parameters? Write --remove 20% for a share, "
        "or --params 100M for what is to be left"
    )


@pytest.mark.parametrize(
    ("text", "units", "amount"),
    [
        ("5.4B", PARAMETER_UNITS, 5_400_000_000),
        ("100m", PARAMETER_UNITS, 100_000_000),
        ("12", PARAMETER_UNITS, 12),
        (" 1.5 K ", PARAMETER_UNITS, 1500),
        ("300MB", BYTE_UNITS, 300_000_000),
        ("1.5GiB", BYTE_UNITS, 3 * 2**29),
        ("7B", BYTE_UNITS, 7),
        ("4.35GB", BYTE_UNITS, 4_350_000_000),
        ("2.3M", PARAMETER_UNITS, 2_300_000),
        ("9" * 400 + "K", PARAMETER_UNITS, None),
    ],
)
def test_amount(text: str, units: dict[str, int], amount: int | None) -> None:
    found = parse_amount(text, units, "params", "5.4B")
    assert found == amount or (amount is None and found > 10**400)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**6), st.integers(0, 3), st.sampled_from([*PARAMETER_UNITS.items()]))
def test_amount_round_trip(number: int, places: int, unit: tuple[str, int]) -> None:
    name, factor = unit
    digits = f"{number:0{places + 1}d}"
    text = f"{digits[: len(digits) - places]}.{digits[len(digits) - places :]}".rstrip(".")
    wanted = number * factor // 10**places
    if wanted:
        assert parse_amount(text + name, PARAMETER_UNITS, "params", "5.4B") == wanted
    else:
        with pytest.raises(RecipeError, match="must be above 0"):
            parse_amount(text + name, PARAMETER_UNITS, "params", "5.4B")


@pytest.mark.parametrize("text", ["", "B", "five", "5Q", "-5M", "5.M", "1e6", "5 M B"])
def test_amount_that_is_none(text: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_amount(text, PARAMETER_UNITS, "params", "5.4B")
    assert str(error.value) == (
        f"params is {text!r}: write a number with one of the units K, M, B, T, such as 5.4B"
    )


# ---- what must go ----------------------------------------------------------------------------

SIZES = {"parameters": 1000, "decoder": 600, "bytes_each": 2}


@pytest.mark.parametrize(
    ("fields", "gone"),
    [
        ({"remove": "20%"}, 200),
        ({"remove": "20%", "of": "decoder"}, 120),
        ({"remove": "0.1%"}, 1),
        ({"params": "800"}, 200),
        ({"params": "0.9K"}, 100),
        ({"size": "1KB"}, 500),
        ({"size": "1001B"}, 500),
        ({"size": "1KiB"}, 488),
    ],
)
def test_parameters_to_remove(fields: dict[str, str], gone: int) -> None:
    assert parameters_to_remove(make_recipe(**fields), **SIZES) == gone


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"params": "1K"}, "--params 1K"),
        ({"params": "5B"}, "--params 5B"),
        ({"size": "2KB"}, "--size 2KB"),
        ({"size": "1TB"}, "--size 1TB"),
        ({"remove": "0.01%"}, "--remove 0.01%"),
    ],
)
def test_nothing_to_remove(fields: dict[str, str], asked: str) -> None:
    with pytest.raises(RecipeError) as error:
        parameters_to_remove(make_recipe(**fields), **SIZES)
    assert str(error.value) == (
        f"{asked} removes nothing: the model has 1,000 parameters (2,000 bytes at 2 bytes each)"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remove": "60%"}, "--remove 60% would remove 600 parameters, but the decoder blocks hold "
         "only 600 of 1,000: ask for clearly less than 60%"),
        ({"remove": "99.99%", "of": "decoder"}, "--remove 99.99% would remove 600 parameters, but "
         "the decoder blocks hold only 600 of 1,000: ask for clearly less than 100%"),
        ({"params": "100"}, "--params 100 would remove 900 parameters, but the decoder blocks hold "
         "only 600 of 1,000: ask for clearly less than 60%"),
        ({"size": "1B"}, "--size 1B would remove 1,000 parameters, but the decoder blocks hold "
         "only 600 of 1,000: ask for clearly less than 60%"),
    ],
)  # fmt: skip
def test_too_much_to_remove(fields: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parameters_to_remove(make_recipe(**fields), **SIZES)
    assert str(error.value) == message


def test_a_recipe_does_not_change() -> None:
    from pydantic import ValidationError

    recipe = Recipe(remove="20%")
    with pytest.raises(ValidationError):
        recipe.seed = 3  # type: ignore[misc]
