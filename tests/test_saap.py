"""SAAP as we read it, against autograd on the whole model; fusion against what it minimises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_llm_pruner import EIGHT, PARTS, SHAPES, left, window_gradients
from test_scored import blocks_of, check_total, highest, kept_units, whole

from secateur.pipeline import make_plan
from secateur.recipe import Recipe, make_recipe
from secateur.solvers.fusion import fluctuation, fused, learned_variances, noise, variances

Folder = Callable[[str], Path]
SHORT = {"samples": 4, "length": 24}
Pair = tuple[np.ndarray, np.ndarray]  # coarse and fine scores, (units,) each


@pytest.fixture(scope="module", autouse=True)
def more_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.MODELS, "eight-heads", EIGHT)
        yield


def recipe(remove: str = "40%", **options: Any) -> Recipe:
    return make_recipe(
        remove=remove, of="decoder", method="saap", calibration=SHORT,
        options={"exempt_first": 0, "exempt_last": 0, **options},
    )  # fmt: skip


# ---- the reference ---------------------------------------------------------------------------


def two_scores(
    weights: dict[str, np.ndarray], windows: list[dict[str, np.ndarray]],
    parts: list[tuple[str, int]], units: int, order: str,
) -> Pair:  # fmt: skip
    """I_v and I_e of each unit from these windows: sums over the layers that it is made of."""
    coarse, fine = np.zeros(units), np.zeros(units)
    for path, axis in parts:
        if order == "second":
            for window in windows:
                change = weights[path] * window[f"{path}.weight"]
                for unit, own in enumerate(np.split(change, units, axis=axis)):
                    coarse[unit] += own.sum() ** 2 / len(windows)
                    fine[unit] += (own**2).sum() / len(windows)
            continue
        g = np.mean([w[f"{path}.weight"] for w in windows], axis=0)
        f = np.mean([w[f"{path}.weight"] ** 2 for w in windows], axis=0)
        change = weights[path] * g - weights[path] ** 2 * f / 2
        for unit, own in enumerate(np.split(change, units, axis=axis)):
            coarse[unit] += abs(own.sum())
            fine[unit] += np.abs(own).sum()
    return coarse, fine


def reference(
    folder: Path, paths: tuple[str, str], groups: int, order: str
) -> list[list[list[Pair]]]:
    """By block and kind: the two scores of all windows together, then those of each."""
    model = whole(folder)
    windows, found = window_gradients(folder, model), []
    for number, block in enumerate(blocks_of(model)):
        weights = {
            n.removesuffix(".weight"): p.detach().double().numpy()
            for n, p in block.named_parameters()
        }
        own = [window[number] for window in windows]
        sizes = (groups, weights[paths[1]].shape[1])
        found.append(
            [
                [
                    two_scores(weights, some, parts, units, order)
                    for some in (own, *([w] for w in own))
                ]
                for parts, units in zip(PARTS[paths], sizes, strict=True)
            ]
        )
    return found


def z(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / x.std(ddof=1)


def mixed(pair: Pair, kind: str, s2: tuple[Any, Any]) -> np.ndarray:
    coarse, fine = pair
    if kind == "adaptive":
        return coarse / (2 * s2[0]) + fine / (2 * s2[1])
    both = {"coarse": coarse, "fine": fine, "sum": coarse + fine, "product": coarse * fine}
    return both[kind]


def unstable(each: list[np.ndarray]) -> np.ndarray:
    mean = np.mean(each, axis=0)
    dead = mean == 0  # a unit that never fires
    return np.where(dead, 0, np.var(each, axis=0) / np.where(dead, 1, mean) ** 2)


def noise_of(kinds: list[list[Pair]], fit: str) -> tuple[float, float]:
    """s1^2 and s2^2 shared by the units of these layers, from all windows and each."""
    found = []
    for i in (0, 1):
        s2 = np.concatenate([kind[0][i] for kind in kinds]).mean()
        if fit == "measured":
            s2 *= np.concatenate([unstable([p[i] for p in kind[1:]]) for kind in kinds]).mean()
        found.append(float(s2))
    return found[0], found[1]


# ---- which units -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["penalty", "alone", "off"])
@pytest.mark.parametrize(
    ("kind", "fit"),
    [
        ("adaptive", "measured"),
        *((k, "closed") for k in ("adaptive", "coarse", "fine", "sum", "product")),
    ],
)
@pytest.mark.parametrize("order", ["second", "mixed"])
def test_the_lowest_of_each_block(
    fit: str, order: str, kind: str, how: str, model_folder: Folder
) -> None:
    """Without one order over all blocks: fusion and fluctuation of units side by side."""
    name, paths, group, groups = SHAPES[0]
    made = recipe("55%", fusion=kind, fluctuation=how, order=order, fit=fit)
    result = make_plan(model_folder(name), made)
    scores = reference(model_folder(name), paths, groups, order)
    for cut, kinds in zip(result.plan.blocks, scores, strict=True):
        for place, (path, width) in enumerate(zip(paths, (group, 1), strict=True)):
            s2 = noise_of([block[place] for block in scores], fit)
            all_, *each = (mixed(pair, kind, s2) for pair in kinds[place])
            ranks = {"off": all_, "alone": -unstable(each), "penalty": z(all_) - z(unstable(each))}
            units = kept_units(cut, path, width)
            assert 0 < len(units) < len(all_)
            assert units == highest(ranks[how], len(units))
    check_total(result.asked, result.plan, 1)


@pytest.mark.parametrize("sigma", ["model", "module", "layer", "group"])
@pytest.mark.parametrize("fit", ["closed", "learned"])
@pytest.mark.parametrize(("name", "paths", "group", "groups"), SHAPES)
def test_noise_and_its_logarithm_between_blocks(
    name: str, paths: tuple[str, str], group: int, groups: int, fit: str, sigma: str,
    model_folder: Folder,
) -> None:  # fmt: skip
    made = recipe("30%", order="mixed", sigma=sigma, fit=fit, shares="global")
    result = make_plan(model_folder(name), made)
    scores = reference(model_folder(name), paths, groups, "mixed")
    pairs = [[kind[0] for kind in block] for block in scores]

    def shared(block: int, place: int) -> tuple[Any, Any]:
        pools = {
            "model": [pair for own in pairs for pair in own],
            "module": [own[place] for own in pairs],
            "layer": [pairs[block][place]],
        }
        if sigma == "group":
            coarse, fine = pairs[block][place]
            return np.maximum(coarse, 1e-30), np.maximum(fine, 1e-30)
        means = [np.concatenate([pair[i] for pair in pools[sigma]]).mean() for i in (0, 1)]
        return means[0], means[1]

    gone, kept = [], []
    for number, cut in enumerate(result.plan.blocks):
        s2 = shared(number, 1)
        ranks = mixed(pairs[number][1], "adaptive", s2) + np.log(s2[0] * s2[1]) / 2
        stays = left(cut, paths[1], 1, len(ranks))
        gone += [float(ranks[u]) for u in range(len(ranks)) if u not in stays]
        kept += [float(ranks[u]) for u in stays] if len(stays) > 1 else []
    assert gone
    assert max(gone) < min(kept) + (1e-4 if fit == "learned" else 0)
    check_total(result.asked, result.plan, 1)


@pytest.mark.parametrize(("name", "paths", "group", "groups"), SHAPES)
def test_one_order_of_standardised_scores(
    name: str, paths: tuple[str, str], group: int, groups: int, model_folder: Folder
) -> None:
    made = recipe("30%", order="mixed", fit="closed", fluctuation="penalty", shares="global")
    result = make_plan(model_folder(name), made)
    scores = reference(model_folder(name), paths, groups, "mixed")
    s2 = noise_of([block[1] for block in scores], "closed")
    gone, kept = [], []
    for cut, block in zip(result.plan.blocks, scores, strict=True):
        all_, *each = (mixed(pair, "adaptive", s2) for pair in block[1])
        ranks = z(all_) - z(unstable(each))
        stays = left(cut, paths[1], 1, len(ranks))
        gone += [float(ranks[u]) for u in range(len(ranks)) if u not in stays]
        kept += [float(ranks[u]) for u in stays] if len(stays) > 1 else []
    assert max(gone) < min(kept)


# ---- the solver ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-9, 1e-2, 1.0, 1e4])
def test_learned_noise_is_the_closed_form(scale: float) -> None:
    scores = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) * scale
    scores[1] *= 7
    torch.testing.assert_close(learned_variances(scores), variances(scores), rtol=1e-4, atol=0)


def test_the_closed_form_is_least() -> None:
    scores = torch.rand(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    best = variances(scores)
    least = fused(scores, best).sum()
    for first in (0.8, 1.0, 1.25):
        for second in (0.8, 1.0, 1.25):
            other = fused(scores, best * torch.tensor([first, second])).sum()
            assert other > least or first == second == 1.0
    own = fused(scores, scores)  # each unit its own noise: 1 + log(I_v I_e) / 2
    torch.testing.assert_close(own, 1 + (scores[0] * scores[1]).log() / 2)
    torch.testing.assert_close(own.argsort(), (scores[0] * scores[1]).argsort())


def test_fluctuation() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    assert fluctuation(scores).tolist() == [0.25, 0.0, 0.0]


def test_noise_of_scores() -> None:
    steady, wild = torch.tensor([[1.0, 2.0], [1.0, 6.0]]), torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    assert noise(torch.stack([steady, wild])).tolist() == [0.125, 0.125]
    assert noise(torch.stack([steady, wild * wild])).tolist() == [0.125, 0.32]
    assert noise(torch.stack([steady, wild])[:, :1]).tolist() == [1.0, 1.0]  # one window
