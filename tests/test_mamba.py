"""Families without attention and FFN: what goes with a channel of Mamba, or a Mamba-2 head."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import secateur
from folders import bytes_of
from forks import forks
from test_kill import KILLED
from test_outputs import logits_of, modules_cache, random_tokens, reopen
from test_pipeline import same_plans

from secateur.anatomy import describe
from secateur.checkpoint import open_checkpoint
from secateur.masking import masked_hidden
from secateur.pipeline import make_plan
from secateur.plans import BlockCut, Plan
from secateur.pruning import PruneResult, prune
from secateur.recipe import Recipe, make_recipe
from secateur.statistics import Moments, gather
from secateur.streaming import Stream

__all__ = ["modules_cache"]  # a fixture that runs by itself

Folder = Callable[[str], Path]
STRUCTURED = {"layers": 0, "exempt_first": 0, "exempt_last": 0, "grid": 8}
COLUMNS = {**STRUCTURED, "denses": "all"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "obs": ("obs", STRUCTURED),
    "comp": ("comp", STRUCTURED),
    "comp inputs": ("comp", COLUMNS),
    "flap": ("flap", {}),
    "wanda-sp": ("wanda-sp", {}),
    "random global": ("random", {"shares": "global"}),
    "magnitude-sp": ("magnitude-sp", {}),
    "shortgpt": ("shortgpt", {}),
    "sleb": ("sleb", {}),
}


def recipe(case: str, remove: str = "40%", **fields: Any) -> Recipe:
    method, options = CASES[case]
    return make_recipe(
        **{
            "remove": remove, "of": "decoder", "method": method, "options": options,
            "calibration": {"samples": 3, "length": 20}, **fields,
        }
    )  # fmt: skip


def difference(done: PruneResult, source: Path) -> tuple[float, float]:
    """Logits of the folder less those of the plan as zeros, and less those of the original."""
    stream, tokens = Stream(open_checkpoint(source)), random_tokens(2, 20)
    found: list[torch.Tensor] = []
    hidden = masked_hidden(stream, done.plan, tokens, torch.float32)
    stream.head(hidden, tokens, lambda _, window: found.append(window))
    planned = torch.stack(found)
    found.clear()
    stream.head(stream.forward(tokens), tokens, lambda _, window: found.append(window))
    got = logits_of(reopen(done.out), tokens)
    return float((got - planned).abs().max()), float((got - torch.stack(found)).abs().max())


@pytest.mark.parametrize("name", ["mamba", "mamba-biases", "mamba2"])
@pytest.mark.parametrize("case", CASES)
def test_the_folder_computes_what_the_plan_says(
    case: str, name: str, model_folder: Folder, tmp_path: Path
) -> None:
    source, asked = model_folder(name), recipe(case)
    done = prune(source, tmp_path / "out", asked, verify=False)
    assert same_plans(make_plan(source, asked).plan, done.plan)
    before, after = done.plan.sizes_before(), done.plan.sizes()
    grain = done.plan.anatomy.block_parameters / 2 / before.decoder
    assert abs(after.decoder_share_removed(before) - 0.4) <= grain
    assert sum(p.numel() for p in reopen(done.out).parameters()) == after.parameters
    wrong, lost = difference(done, source)
    assert wrong < 1e-4
    assert lost > 1e-2


# ---- the coupling, against a model that is cut by hand ---------------------------------------


def test_uniform_inner_channels_are_a_stock_model(model_folder: Folder, tmp_path: Path) -> None:
    """Everything of the lost channels is deleted by hand, by what the class does with it."""
    source = model_folder("mamba")
    done = prune(source, tmp_path / "out", recipe("random global", options={}, layout="uniform"),
                 verify=False)  # fmt: skip
    config = json.loads((done.out / "config.json").read_text())
    assert config["model_type"] == "mamba"
    width = config["intermediate_size"]
    assert width < 64
    model, whole = reopen(done.out), tiny.make_model("mamba")
    for cut, small, large in zip(
        done.plan.blocks, model.backbone.layers, whole.backbone.layers, strict=True
    ):
        kept, a, b = cut.inputs["mixer.out_proj"], small.mixer, large.mixer
        assert len(kept) == width
        scanned, gate = b.in_proj.weight.chunk(2)
        assert torch.equal(a.in_proj.weight, torch.cat([scanned[kept], gate[kept]]))
        assert torch.equal(a.conv1d.weight, b.conv1d.weight[kept])
        assert torch.equal(a.conv1d.bias, b.conv1d.bias[kept])
        assert torch.equal(a.x_proj.weight, b.x_proj.weight[:, kept])
        assert torch.equal(a.dt_proj.weight, b.dt_proj.weight[kept])
        assert torch.equal(a.dt_proj.bias, b.dt_proj.bias[kept])
        assert torch.equal(a.A_log, b.A_log[kept])
        assert torch.equal(a.D, b.D[kept])
        assert torch.equal(a.out_proj.weight, b.out_proj.weight[:, kept])
        # The original with nobody reading the others, neither before nor behind the scan.
        dead = torch.ones(64, dtype=torch.bool)
        dead[kept] = False
        with torch.no_grad():
            b.x_proj.weight[:, dead] = 0
            b.out_proj.weight[:, dead] = 0
    tokens = random_tokens(2, 20)
    torch.testing.assert_close(
        logits_of(model, tokens), logits_of(whole, tokens), rtol=1e-4, atol=1e-4
    )


def test_a_lost_head_is_as_if_it_were_silent(model_folder: Folder, tmp_path: Path) -> None:
    """A head that puts out nothing: what it scans comes from the convolution's bias alone."""
    source = model_folder("mamba2")
    done = prune(source, tmp_path / "out", recipe("random global"), verify=False)
    whole = tiny.make_model("mamba2")
    lost = 0
    for cut, block in zip(done.plan.blocks, whole.backbone.layers, strict=True):
        kept = set(range(8)) if cut.groups is None else set(cut.groups.tolist())
        lost += 8 - len(kept)
        with torch.no_grad():
            for head in set(range(8)) - kept:
                places = slice(head * 8, head * 8 + 8)
                block.mixer.conv1d.weight[places] = 0
                block.mixer.conv1d.bias[places] = 0
    assert lost
    assert {len(cut.groups) for cut in done.plan.blocks if cut.groups is not None} != {8 - lost / 4}
    tokens = random_tokens(2, 20)
    torch.testing.assert_close(
        logits_of(reopen(done.out), tokens), logits_of(whole, tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("name", "case"), [("mamba", "obs"), ("mamba2", "flap")])
def test_generation_with_a_cache_equals_without(
    name: str, case: str, model_folder: Folder, tmp_path: Path
) -> None:
    """Convolution and state take their sizes from the cut layers."""
    model = reopen(prune(model_folder(name), tmp_path / "out", recipe(case), verify=False).out)
    prompt = random_tokens(1, 9)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        one, other = (
            model.generate(prompt, use_cache=cache, **settings) for cache in (True, False)
        )
    assert one.tolist() == other.tolist()


def test_obs_fits_both_readers(model_folder: Folder, tmp_path: Path) -> None:
    """What is fitted puts out more of what the layers put out than the plain cut does."""
    source = model_folder("mamba")
    done = prune(source, tmp_path / "fitted", recipe("obs"), verify=False)
    plain = {**STRUCTURED, "refit": False}
    other = prune(source, tmp_path / "plain", recipe("obs", options=plain), verify=False)
    fitted, cut = done.plan.blocks[0].notes["error"], other.plan.blocks[0].notes["error"]
    assert set(fitted) == {"mixer.out_proj", "mixer.x_proj"}
    assert fitted["mixer.out_proj"] < cut["mixer.out_proj"]


def test_time_steps_are_measured_though_their_layer_is_never_called() -> None:
    model = tiny.make_model("mamba")
    block, anatomy = model.backbone.layers[0], describe(model)
    hidden, seen = torch.randn(2, 9, 32), []
    hook = block.mixer.x_proj.register_forward_hook(lambda *args: seen.append(args[-1]))
    place = anatomy.behind("steps")
    assert place == ("mixer.x_proj", 5)
    with torch.no_grad(), gather(
        block, {"steps": "mixer.dt_proj"}, Moments, behind={"steps": place}
    ) as (found, _):  # fmt: skip
        block(hidden)
    hook.remove()
    steps = seen[0][..., :5].reshape(-1, 5).double()
    torch.testing.assert_close(found["steps"].second, steps.T @ steps)


def test_time_steps_that_go_take_rows_of_what_makes_them() -> None:
    model = copy.deepcopy(tiny.make_model("mamba"))
    anatomy = describe(model)
    cut = BlockCut(0, {"mixer.dt_proj": torch.tensor([0, 3])})
    from secateur.coupled import live_rows

    cut.rows = live_rows(anatomy, cut.inputs)
    # Steps 1, 2 and 4 go; 4 states each of B and C stay.
    assert cut.rows["mixer.x_proj"].tolist() == [0, 3, *range(5, 13)]
    plan = Plan(anatomy, [cut])
    assert plan.counts(cut) == {"mixer.time_step_rank": ["mixer.dt_proj.weight", 1]}
    assert plan.widths(cut) is None


# ---- kills -----------------------------------------------------------------------------------


def test_killed_and_gone_on_with(model_folder: Folder, tmp_path: Path) -> None:
    with forks(model_folder("mamba"), recipe) as ask:
        status, moments = ask("obs", tmp_path / "whole")
        assert status == 0
        wanted = bytes_of(tmp_path / "whole")
        blocks = [i for i, name in enumerate(moments) if name == "after line block"]
        for at in (blocks[0], blocks[2] - 1):
            out = tmp_path / str(at) / "out"
            assert ask("obs", out, at)[0] == KILLED
            assert ask("obs", out)[0] == 0
            assert bytes_of(out) == wanted


# ---- refusals --------------------------------------------------------------------------------

REFUSED: list[tuple[str, list[str], str]] = [
    (
        "mamba2-groups",
        ["--method", "obs"],
        "heads of this mamba2 model share B and C in 2 groups (n_groups), whose heads cannot go "
        "one by one: use --method comp with --structure inputs, or --method shortgpt",
    ),
    (
        "mamba2",
        ["--method", "obs", "--layout", "uniform"],
        "the stock class of mamba2 holds 8 heads and no other number, and method obs removes "
        "nothing else: use --layout per-layer",
    ),
    (
        "mamba",
        ["--method", "wanda-sp", "--set", "groups=2"],
        "groups is 2, but blocks of mamba are not made of KV groups and neurons: leave it out",
    ),
    (
        "mamba2",
        ["--method", "obs", "--round-to", "32"],
        "--round-to is 32, but blocks of mamba2 have no FFN whose width it could round: leave it "
        "out",
    ),
    (
        "mamba",
        ["--method", "slicegpt"],
        "model type mamba has no residual stream described, which slicing the hidden width needs: "
        "fill its entry residual in secateur/anatomy/families.py, or use another --method",
    ),
]


@pytest.mark.parametrize(("name", "options", "text"), REFUSED)
def test_what_makes_no_sense_is_refused(
    name: str, options: list[str], text: str, model_folder: Folder, tmp_path: Path
) -> None:
    command = ["prune", model_folder(name), "--remove", "20%", "--out", tmp_path / "out"]
    secateur(*command, *options).refused(text)
    assert not list(tmp_path.iterdir())


def test_inspect_says_what_blocks_are_made_of(model_folder: Folder) -> None:
    said = secateur("inspect", model_folder("mamba")).fine()
    assert "inner channels     64\n" in said
    assert "attention" not in said
    assert (
        "scan               8 heads, head size 8"
        in secateur("inspect", model_folder("mamba2")).fine()
    )
