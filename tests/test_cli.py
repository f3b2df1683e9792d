"""The command line, and the same things through ``import secateur``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import help_pages
import pytest

import secateur
from secateur import cli

Folder = Callable[[str], Path]
SHORT = ("--samples", "4", "--length", "24")
CUT = (*SHORT, "--remove", "30%", "--of", "decoder", "--layers", "0",
       "--set", "exempt_first=0", "--set", "exempt_last=0", "--set", "grid=8")  # fmt: skip


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int | str | None, str, str]]:
    """Run the program with these arguments; exit code, output and errors."""

    def run(*arguments: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


Call = Callable[..., tuple[int | str | None, str, str]]


def asked_and_reached(output: str) -> tuple[int, int]:
    found = re.search(r"^asked ([\d,]+) parameters, reached ([\d,]+) \(", output, re.MULTILINE)
    assert found, output
    return tuple(int(number.replace(",", "")) for number in found.groups())  # type: ignore[return-value]


def row(output: str, name: str) -> list[str]:
    """The cells of a table's row."""
    (line,) = [line for line in output.splitlines() if line.startswith(name + "  ")]
    return re.split(r"  +", line.strip())[1:]


# ---- help ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), *((name,) for name in help_pages.commands())])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(arguments: tuple[str, ...], flag: str, call: Call) -> None:
    code, out, err = call(*arguments, flag)
    assert code in (0, None)
    assert out.startswith("Usage: ")
    assert "--help" in out
    assert err == ""
    assert "\x1b" not in out


def test_no_arguments_show_the_help(call: Call) -> None:
    code, out, _ = call()
    assert code in (0, None)
    assert all(name in out for name in ("prune", "plan", "inspect", "eval", "demo"))


def test_every_option_is_explained() -> None:
    from typer.main import get_command

    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        assert command.help, name
        for option in command.params:
            assert getattr(option, "help", None), f"{name} {option.name}"


def test_help_needs_neither_torch_nor_transformers() -> None:
    """So that it comes at once: importing torch takes a second."""
    code = (
        "import sys, secateur, secateur.cli; from secateur.errors import SecateurError; "
        "sys.argv = ['secateur', 'prune', '--help']\n"
        "try:\n    secateur.cli.main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'gguf', 'tokenizers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Usage: " in ran.stdout


def test_it_runs_as_a_module() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "secateur", "plan"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert re.fullmatch(r"error: .*SOURCE.*; see secateur --help\n", ran.stderr)


# ---- commands --------------------------------------------------------------------------------


def test_plan(call: Call, model_folder: Folder) -> None:
    source = model_folder("llama-gqa-tied")
    code, out, err = call("plan", source, *CUT, "--set", "denses=all")
    assert code in (0, None), err
    asked, reached = asked_and_reached(out)
    assert asked == round(0.3 * 30976)
    assert abs(reached - asked) < 0.01 * 30976
    assert row(out, "parameters") == ["40,608", f"{40608 - reached:,}", f"{reached / 40608:.2%}"]
    assert row(out, "in decoder blocks")[0] == "30,976"
    assert row(out, "blocks") == ["4", "4", "none"]
    lines = out.splitlines()
    assert lines[0].split() == ["block", "importance", "removed", "inputs", "x", "rows", "left"]
    assert [line.split()[0] for line in lines[1:5]] == ["0", "1", "2", "3"]
    assert "down_proj" in "".join(lines[1:5])
    assert "peak memory" in out
    assert "cutting blocks 4/4" in err


def test_prune_eval_and_inspect(call: Call, model_folder: Folder, tmp_path: Path) -> None:
    """One round as a user goes it, the check in a fresh process included."""
    source, out = model_folder("qwen3"), tmp_path / "out"
    code, said, err = call("prune", source, "--out", out, *CUT)
    assert code in (0, None), err
    asked, reached = asked_and_reached(said)
    record = json.loads((out / "secateur.json").read_text())
    assert record["asked"]["parameters_removed"] == asked
    assert record["reached"]["parameters_removed"] == reached
    assert record["recipe"]["remove"] == "30%"
    assert record["method_options"]["exempt_last"] == 0
    assert "reopened in a fresh process as SecateurQwen3ForCausalLM" in said
    assert said.splitlines()[-1] == f"written to {out}"

    code, said, err = call("eval", out, "--length", "48", "--windows", "3", "--tokens", "0")
    assert code in (0, None), err
    found = secateur.evaluate(out, length=48, windows=3)
    assert said == f"perplexity {found.value:.2f}  ({found.protocol})\n"
    code, with_text, _ = call("eval", out, "--length", "48", "--windows", "3", "--tokens", "5")
    assert code in (0, None)
    assert with_text.startswith(said + "The capital of France is")

    code, said, err = call("inspect", out)
    assert code in (0, None), err
    after = record["plan"]["parameters"]["after"]
    assert row(said, "parameters") == [f"{after:,}"]
    assert row(said, "blocks") == ["4 of different sizes"]
    assert row(said, "in decoder blocks") == [f"{record['plan']['decoder_parameters']['after']:,}"]

    code, said, err = call("prune", source, "--out", out, *CUT)
    assert (code, said) == (2, "")
    assert re.search(r"^error: output .* exists and is not empty: choose another --out", err)


@pytest.mark.parametrize(
    ("name", "family", "heads"),
    [
        ("llama-gqa-tied", "LLaMA (llama)", "4 query heads in 2 KV groups of size 2, head size 8"),
        ("opt-project", "OPT (opt)", "4 query heads in 4 KV groups of size 1, head size 8"),
    ],
)
def test_inspect(name: str, family: str, heads: str, call: Call, model_folder: Folder) -> None:
    code, out, err = call("inspect", model_folder(name))
    assert code in (0, None), err
    assert row(out, "family") == [family]
    assert row(out, "attention") == [heads]
    assert row(out, "hidden width") == ["32"]
    assert re.fullmatch(r"4 at [\d,]+ parameters", row(out, "blocks")[0])
    assert row(out, "vocabulary") == ["300"]
    assert row(out, "tied head") == ["yes"]
    parameters = int(row(out, "parameters")[0].replace(",", ""))
    parts = re.findall(r"^.+?  +([\d,]+)  +[\d.]+%$", out, re.MULTILINE)
    assert sum(int(part.replace(",", "")) for part in parts) == parameters
    assert "torch" not in err


def test_a_recipe_file_and_options_over_it(
    call: Call, model_folder: Folder, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "remove: 10%\nof: decoder\nseed: 3\n"
        "calibration: {samples: 4, length: 24}\n"
        "options: {layers: 0, exempt_first: 0, exempt_last: 0, denses: all}\n"
    )
    source = model_folder("opt")
    asked = [
        asked_and_reached(call("plan", source, "--recipe", file, *more)[1])[0]
        for more in ((), ("--remove", "20%"), ("--params", "40K"))
    ]
    assert asked == [3418, 6835, 8000]
    code, _, err = call("plan", source, "--recipe", file, "--remove", "20%", "--size", "1MB")
    assert code == 2
    assert "exactly one of --remove, --params, --size and --sparsity" in err
    _, out, _ = call("plan", source, "--recipe", file, "--remove", "40%", "--layers", "1")
    assert row(out, "blocks")[1] == "3"


def test_interrupted(
    call: Call, model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    from secateur import pipeline

    monkeypatch.setattr(pipeline.hf, "write_outside", interrupt)
    source, out = model_folder("opt"), tmp_path / "out"
    code, said, err = call("prune", source, "--out", out, *CUT)
    assert (code, said) == (130, "")
    assert err.splitlines()[-1].startswith("error: interrupted; finished blocks are kept")
    monkeypatch.undo()
    assert secateur.plan  # the library is whole
    assert (tmp_path / "out.partial").is_dir()


# ---- the library -----------------------------------------------------------------------------


def test_the_same_through_the_library(model_folder: Folder, tmp_path: Path) -> None:
    recipe = secateur.Recipe(
        remove="30%",
        of="decoder",
        options={"layers": 1},
        calibration={"samples": 4, "length": 24},  # type: ignore[arg-type]
    )
    options = {**recipe.options, "exempt_first": 0, "exempt_last": 0}
    recipe = recipe.model_copy(update={"options": options})
    source = model_folder("mistral")
    planned = secateur.plan(source, recipe)
    result = secateur.prune(source, tmp_path / "out", recipe, verify=False)
    assert isinstance(result.plan, secateur.Plan)
    assert result.plan.sizes() == planned.plan.sizes()
    assert secateur.evaluate(result.out, length=32, windows=2).value > 1
    assert secateur.open_model(result.out).config.num_hidden_layers == 3
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(exclude_none=True)))  # JSON is YAML
    assert secateur.load_recipe(file) == recipe
    with pytest.raises(secateur.SecateurError):
        secateur.open_model(tmp_path / "nowhere")


def test_public_names_come_when_asked_for() -> None:
    code = (
        "import sys, secateur\n"
        "assert 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
        "assert set(secateur.__all__) <= set(dir(secateur))\n"
        "assert not hasattr(secateur, 'graft')\n"
        "for name in secateur.__all__:\n    assert getattr(secateur, name) is not None\n"
        "assert secateur.__version__[0].isdigit()\n"
        "from secateur import *\n"
        "assert prune is secateur.prune and 'torch' in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
