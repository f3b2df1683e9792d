"""What obs decides by itself: when gradients take part, and what that means for shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import engine as engine_file
from secateur.checkpoint import open_checkpoint
from secateur.engine import Engine
from secateur.errors import RecipeError
from secateur.forms import Form
from secateur.methods import obs
from secateur.methods.obs import Obs, ObsOptions
from secateur.pipeline import make_plan
from secateur.progress import Progress
from secateur.recipe import make_recipe
from secateur.streaming import Stream

Folder = Callable[[str], Path]


def method(**options: Any) -> Obs:
    return Obs(ObsOptions(**options), Form())


def test_gradients_take_part_where_text_is_enough_for_them(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    anatomy = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy
    mamba = Stream(open_checkpoint(model_folder("mamba"))).anatomy
    assert method().survey_by(anatomy, 29_999) is None
    assert method().survey_by(anatomy, 30_000) == "gradients"
    assert method().survey_by(mamba, 30_000) is None  # has no gradients of units
    assert method(gradients=0).survey_by(anatomy, 30_000) is None
    assert method(gradients=0.3).survey_by(anatomy, 10) == "gradients"
    monkeypatch.setattr(obs, "SMALL", 1000)
    assert method().survey_by(anatomy, 30_000) is None


def test_beside_gradients_blocks_lose_the_same_and_both_ends_nothing(model_folder: Folder) -> None:
    from dataclasses import replace

    anatomy = replace(Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy, layers=16)
    importances = {layer: 1.0 + layer for layer in range(16)}
    surveys = {layer: {"mlp.down_proj": torch.ones(64)} for layer in range(16)}
    total = 3 * anatomy.block_parameters

    def lose(surveys: Any, total: int = total, **options: Any) -> list[int]:
        shares = method(**options).allocate(anatomy, list(range(16)), importances, surveys, total)
        return [share.parameters for share in shares.values()]

    # Half of 32 blocks: 1 and 0 spared by COMP's numbers, 2 and 1 by those beside gradients.
    plain = lose({})
    assert [i for i, lost in enumerate(plain) if not lost] == [0]
    assert plain[1] > 2 * plain[15]
    beside = lose(surveys)
    assert [i for i, lost in enumerate(beside) if not lost] == [0, 1, 15]
    assert max(beside[2:15]) - min(beside[2:15]) <= 1
    assert sum(beside) == sum(plain) == total
    said = lose(surveys, shares="importance", exempt_first=0, exempt_last=2)
    assert [i for i, lost in enumerate(said) if not lost] == [14, 15]
    assert said[0] > 2 * said[13]
    # Thirteen blocks have no room for what fifteen have.
    much = int(0.85 * method()._most_removable(anatomy)) * 14
    assert lose(surveys, much) == lose({}, much)
    with pytest.raises(RecipeError):
        lose(surveys, int(much * 16 / 14))


def test_trials_share_one_survey(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = method(gradients=0.5, copies=0, written=0, rounds=0, exempt_first=0, exempt_last=0)
    stream = Stream(open_checkpoint(model_folder("llama-gqa-tied")))
    engine = Engine(
        stream, asked, to_remove=stream.anatomy.block_parameters * 5 // 4, seed=0,
        dtype=torch.float32, progress=Progress(),
    )  # fmt: skip
    surveyed: list[int] = []
    by_gradients = engine_file.by_gradients

    def counting(stream: Stream, method: Obs, tokens: torch.Tensor, *rest: Any) -> Any:
        surveyed.append(len(tokens))
        return by_gradients(stream, method, tokens, *rest)

    monkeypatch.setattr(engine_file, "by_gradients", counting)
    tokens = torch.randint(0, 100, (6, 16), generator=torch.Generator().manual_seed(0))
    engine.choose_layers(tokens)
    assert [trial["layers"] for trial in engine.trials] == [0, 1]
    assert surveyed == [4]

    choices = iter(engine.layer_stage(tokens))
    whole, shorter = next(choices), next(choices)
    known: dict[int, Any] = {}
    engine.shares(whole, tokens, known)
    assert sorted(known) == [0, 1, 2, 3]
    assert engine.shares(shorter, tokens, known) == engine.shares(shorter, tokens)
    assert len(surveyed) == 3


def test_heads_stay_where_three_quarters_of_the_neurons_are_enough(model_folder: Folder) -> None:
    def groups_left(remove: str, **options: Any) -> int:
        made = make_recipe(
            method="obs", remove=remove, of="decoder", round_to=1,
            calibration={"samples": 4, "length": 24},
            options={"layers": 0, "copies": 0, "written": 0, "exempt_first": 0, "exempt_last": 0,
                     "cap": 0.95, "shares": "uniform", **options},
        )  # fmt: skip
        plan = make_plan(model_folder("llama-gqa-tied"), made).plan
        every = plan.anatomy.kv_heads
        return sum(every if cut.groups is None else len(cut.groups) for cut in plan.blocks)

    anatomy = Stream(open_checkpoint(model_folder("llama-gqa-tied"))).anatomy
    every = anatomy.kv_heads * anatomy.layers
    down = anatomy.denses["mlp.down_proj"]
    most = down.inputs // 4 * 3 * 3 * down.rows
    share = most / anatomy.block_parameters
    below, above = (f"{100 * share + off:.1f}%" for off in (-3, 8))
    assert groups_left(below) == every
    assert groups_left(above) < every
    assert groups_left(above, groups="keep") == every
