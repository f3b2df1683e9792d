"""FPT against masks that are really there, an exhaustive search and dense least squares."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import secateur
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llm_pruner import EIGHT, left
from test_scored import (
    LLAMA,
    OPT,
    blocks_of,
    check_total,
    highest,
    inputs_of,
    kept_units,
    neuron_of,
    whole,
    windows_of,
)

from secateur.pipeline import make_plan
from secateur.recipe import Recipe, make_recipe
from secateur.solvers.mask_search import fisher_diagonal, rearranged, search
from secateur.streaming import Stream

Folder = Callable[[str], Path]
SHORT = {"samples": 4, "length": 24}
#: Model, paths of the two outputs, and inputs that a KV group makes.
SHAPES = [("eight-heads", LLAMA, 8), ("llama-gqa-tied", LLAMA, 16), ("opt", OPT, 8)]


@pytest.fixture(scope="module", autouse=True)
def more_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.MODELS, "eight-heads", EIGHT)
        yield


def recipe(remove: str = "40%", **fields: Any) -> Recipe:
    return make_recipe(
        **{"remove": remove, "of": "decoder", "method": "fpt", "calibration": SHORT, **fields}
    )


# ---- gradients of masks ----------------------------------------------------------------------


def mask_gradients(
    folder: Path, paths: tuple[str, str], group: int, batch: int = 1
) -> list[dict[str, np.ndarray]]:
    """By block and layer: dL/dm of mask variables that multiply the inputs, (batches, units)."""
    model = whole(folder).requires_grad_(False)
    masks: list[dict[str, torch.Tensor]] = []

    def multiply(mask: torch.Tensor, width: int) -> Any:
        return lambda _, args: (args[0] * mask.repeat_interleave(width),)

    for block in blocks_of(model):
        own = {}
        for path, width in zip(paths, (group, 1), strict=True):
            layer = block.get_submodule(path)
            own[path] = torch.ones(layer.in_features // width, requires_grad=True)
            layer.register_forward_pre_hook(multiply(own[path], width))
        masks.append(own)
    flat = [mask for own in masks for mask in own.values()]
    rows = []
    for windows in windows_of(folder).split(batch):
        loss = model(input_ids=windows, labels=windows, use_cache=False).loss * len(windows)
        rows.append(torch.autograd.grad(loss, flat))
    stacked = [torch.stack(of_one).double().numpy() for of_one in zip(*rows, strict=True)]
    found = iter(stacked)
    return [{path: next(found) for path in paths} for _ in masks]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "paths", "group"), SHAPES)
def test_the_same_share_goes_by_fisher(
    name: str, paths: tuple[str, str], group: int, batch: int, model_folder: Folder
) -> None:
    options = {"shares": "uniform", "rearrange": False, "tune": False, "batch": batch}
    result = make_plan(model_folder(name), recipe("55%", options=options))
    found = mask_gradients(model_folder(name), paths, group, batch)
    for cut, own in zip(result.plan.blocks, found, strict=True):
        assert not cut.scales
        for path, width in zip(paths, (group, 1), strict=True):
            units = kept_units(cut, path, width)
            score = (own[path] ** 2).sum(0)
            assert 0 < len(units) < len(score)
            assert units == highest(score, len(units))
    check_total(result.asked, result.plan, 1)


@pytest.mark.parametrize("round_to", [1, 32])
@pytest.mark.parametrize(("name", "paths", "group"), SHAPES)
def test_the_search_over_all_blocks(
    name: str, paths: tuple[str, str], group: int, round_to: int, model_folder: Folder
) -> None:
    """No number of groups, with the neurons that then go, loses less importance."""
    if round_to > 1 and name != "opt":
        pytest.skip("an FFN of 48 has no pieces of 32")
    options = {"rearrange": False, "tune": False}
    result = make_plan(model_folder(name), recipe("30%", options=options, round_to=round_to))
    plan, anatomy = result.plan, result.plan.anatomy
    scores = [
        {path: (own[path] ** 2).sum(0) for path in paths}
        for own in mask_gradients(model_folder(name), paths, group)
    ]
    gone: dict[str, float] = dict.fromkeys(paths, 0.0)
    counts = dict.fromkeys(paths, 0)
    for cut, own in zip(plan.blocks, scores, strict=True):
        for path, width in zip(paths, (group, 1), strict=True):
            units = left(cut, path, width, len(own[path]))
            assert units == highest(own[path], len(units))
            lost = np.setdiff1d(np.arange(len(own[path])), units)
            gone[path] += own[path][lost].sum()
            counts[path] += len(lost)
    if round_to > 1:
        check_total(result.asked, plan, round_to)
        return
    attention, size = anatomy.coupling("values"), anatomy.head_size
    dense, neuron = anatomy.denses, neuron_of(plan)
    each = group * dense[paths[0]].rows
    for names, rows in ((attention.queries, group), (attention.keys + attention.producers, size)):
        each += sum(rows * (dense[path].inputs + dense[path].bias) for path in names)
    assert plan.gone == each * counts[paths[0]] + neuron * counts[paths[1]]
    neurons = sorted((float(s), i) for i, own in enumerate(scores) for s in own[paths[1]])
    groups = sorted((float(s), i) for i, own in enumerate(scores) for s in own[paths[0]])
    for number in range(len(groups) + 1):
        lost = [block for _, block in groups[:number]]
        wanted = round((result.asked - each * number) / neuron)
        fallen = [block for _, block in neurons[: max(0, wanted)]]
        if max(map(lost.count, range(4))) >= anatomy.kv_heads or not 0 <= wanted <= len(neurons):
            continue
        if max(map(fallen.count, range(4))) >= anatomy.ffn_width:
            continue  # a block's last unit stays
        cost = sum(s for s, _ in groups[:number]) + sum(s for s, _ in neurons[:wanted])
        assert sum(gone.values()) <= cost * (1 + 1e-6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_search_looks_at_every_split(data: st.DataObject) -> None:
    numbers = st.integers(1, 30)
    groups = {i: torch.tensor(data.draw(st.lists(numbers, min_size=3, max_size=3)),
                              dtype=torch.float64) for i in range(2)}  # fmt: skip
    neurons = {i: torch.tensor(data.draw(st.lists(numbers, min_size=8, max_size=8)),
                               dtype=torch.float64) for i in range(2)}  # fmt: skip
    total, price = data.draw(st.integers(1, 12)), 3  # a group costs as much as three neurons

    def lowest_neurons(count: int) -> dict[int, int]:
        order = sorted((float(s), i) for i in neurons for s in neurons[i])[: max(0, count)]
        return {i: sum(layer == i for _, layer in order) for i in neurons}

    found = search(
        groups,
        neurons,
        most=2,
        fill=lambda lost: lowest_neurons(total - price * sum(lost.values())),
        miss=lambda lost, n: abs(total - price * sum(lost.values()) - sum(n.values())),
        tolerance=0,
    )

    def cost(lost: dict[int, int], fallen: dict[int, int]) -> float:
        pairs = ((groups, lost), (neurons, fallen))
        return sum(float(own[i].sort().values[: n[i]].sum()) for own, n in pairs for i in own)

    best = min(
        cost(dict(enumerate(lost)), lowest_neurons(total - price * sum(lost)))
        for lost in itertools.product(range(3), repeat=2)
        if price * sum(lost) <= total
    )
    assert cost(*found) == pytest.approx(best)
    assert price * sum(found[0].values()) + sum(found[1].values()) == total


# ---- rearrangement ---------------------------------------------------------------------------


def literal(gradients: np.ndarray, count: int) -> list[int]:
    """One unit after the other is let in; the member goes without which the cost is least."""
    diagonal = (gradients**2).sum(0)
    order = sorted(range(len(diagonal)), key=lambda unit: (diagonal[unit], unit))
    members = order[:count]
    for unit in order[count:]:
        joined = [*members, unit]
        costs = [
            (gradients[:, [m for m in joined if m != gone]].sum(1) ** 2).sum() for gone in joined
        ]
        joined.pop(int(np.argmin(costs)))
        members = joined
    return sorted(members)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(2, 12), st.integers(0, 10**6), st.data())
def test_rearrangement(batches: int, units: int, seed: int, data: st.DataObject) -> None:
    gradients = np.random.default_rng(seed).standard_normal((batches, units))
    count = data.draw(st.integers(1, units - 1))
    found = rearranged(torch.tensor(gradients), count)
    assert found.tolist() == literal(gradients, count)

    def cost(members: list[int]) -> float:
        return float((gradients[:, members].sum(1) ** 2).sum())

    begun = fisher_diagonal(torch.tensor(gradients)).argsort()[:count].tolist()
    assert cost(found.tolist()) <= cost(begun) * (1 + 1e-9)


def test_rearrangement_of_none_and_all() -> None:
    gradients = torch.randn(3, 5)
    assert rearranged(gradients, 0).tolist() == []
    assert rearranged(gradients, 5).tolist() == [0, 1, 2, 3, 4]


def test_rearranged_units_go(model_folder: Folder) -> None:
    made = recipe("45%", options={"shares": "uniform", "tune": False, "groups": "keep"})
    plan = make_plan(model_folder("opt"), made).plan
    found = mask_gradients(model_folder("opt"), OPT, 8)
    swapped = 0
    for cut, own in zip(plan.blocks, found, strict=True):
        kept = kept_units(cut, "fc2", 1)
        gone = literal(own["fc2"], 64 - len(kept))
        assert kept == sorted(set(range(64)) - set(gone))
        swapped += kept != highest((own["fc2"] ** 2).sum(0), len(kept))
    assert swapped


# ---- mask tuning -----------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["sequential", "identical"])
@pytest.mark.parametrize(("name", "paths", "group"), SHAPES)
def test_scales_are_least_squares(
    name: str, paths: tuple[str, str], group: int, inputs: str, model_folder: Folder
) -> None:
    """One unknown a unit, over all outputs and tokens, pulled to 1; sequential: on what is left."""
    options = {"shares": "uniform", "inputs": inputs, "damping": 0.05}
    plan = make_plan(model_folder(name), recipe("55%", options=options)).plan
    model, tokens = whole(model_folder(name)), windows_of(model_folder(name))
    moved = []
    for number, cut in enumerate(plan.blocks):
        assert (paths[0] in cut.scales) == (number > 0)  # not the attention of the first block
        read = {path: inputs_of(model, number, path, tokens) for path in paths}
        for path, width in zip(paths, (group, 1), strict=True):
            weight = blocks_of(model)[number].get_submodule(path).weight
            w, x = weight.detach().double().numpy(), read[path]
            units = kept_units(cut, path, width)
            out = np.stack(
                [
                    x[:, u * width : (u + 1) * width] @ w[:, u * width : (u + 1) * width].T
                    for u in range(w.shape[1] // width)
                ],
                axis=-1,
            ).reshape(-1, w.shape[1] // width)  # (tokens x p, units)
            s = 0.05 * (out**2).sum(0).mean()
            a = out[:, units]
            tuned = np.linalg.solve(a.T @ a + s * np.eye(len(units)), a.T @ out.sum(1) + s)
            if path in cut.scales:
                got = cut.scales[path].double().numpy()
                np.testing.assert_allclose(got, np.repeat(tuned, width), rtol=1e-3, atol=1e-3)
                moved.append(np.abs(tuned - 1).max())
            if inputs == "sequential":
                kept = cut.inputs[path].tolist()
                scale = cut.scales.get(path, torch.ones(len(kept)))
                with torch.no_grad():
                    gone = sorted(set(range(w.shape[1])) - set(kept))
                    weight[:, gone] = 0
                    weight[:, kept] *= scale
    assert min(moved[::2]) > 0.02  # those of the neurons, at least


def test_a_wild_fit_is_not_taken(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.solvers.mask_tuning.GUARD", 0.5)
    made = recipe(options={"shares": "uniform", "groups": "keep"})
    plan = make_plan(model_folder("opt"), made).plan
    for cut in plan.blocks:
        assert cut.notes["tuned"] == {"fc2": False}
        assert cut.steps == [f"block {cut.source}, fc2: no tuning (a scale is beyond 0.5)"]
        assert not cut.scales


def test_without_tuning_the_cut_runs_no_block(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[int] = []
    real = Stream.call_block

    def noted(self: Stream, index: int, *args: Any) -> torch.Tensor:
        run.append(index)
        return real(self, index, *args)

    monkeypatch.setattr(Stream, "call_block", noted)
    make_plan(model_folder("opt"), recipe(options={"tune": False, "batch": 4}))
    assert run == [0, 1, 2, 3, 3, 2, 1, 0]


def test_one_width_for_all(model_folder: Folder) -> None:
    folder = model_folder("eight-heads")
    made = recipe("50%", layout="uniform", options={"shares": "uniform"})
    result = make_plan(folder, made)
    assert result.plan.uniform is not None
    assert result.plan.uniform.kv_groups == 2
    wishes = ("plan", folder, "--of", "decoder", "--method", "fpt", "--remove", "30%")
    ended = secateur(*wishes, "--layout", "uniform")
    assert ended.code == 2
    assert ended.err[-1] == (
        "error: method fpt ranks all blocks together (shares search), which gives each its own "
        "widths: use --layout per-layer, or --set shares=uniform"
    )
