"""COMP: the fast neuron stage against a literal Algorithm 1, quotas against Eq. 10, options."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_comp import literal_neuron_stage

from secateur.anatomy import Anatomy, describe
from secateur.errors import RecipeError
from secateur.forms import Form
from secateur.methods import Block, get_method, method_names
from secateur.methods.comp import Comp
from secateur.methods.units import exempt
from secateur.plans import BlockCut, Plan, Tensors, live_rows
from secateur.slicing import mask_block, slice_block
from secateur.solvers.gram import gram, importance
from secateur.solvers.mask_tuning import GUARD
from secateur.statistics import Moments, gather_moments

ORDERS = ("condition", "condition-literal", "energy", "obs", "random")
DENSES = ("all", "outputs", "neurons")
ALLOCATIONS = ("variance", "error")


@dataclass(frozen=True)
class Sample:
    """A block of a tiny model, its tensors, and the statistics of its inputs."""

    anatomy: Anatomy
    state: Tensors
    moments: dict[str, Moments]
    inputs: torch.Tensor

    def block(self, seed: int = 0) -> Block:
        weights = {name: self.state[f"{name}.weight"] for name in self.anatomy.denses}
        generator = torch.Generator().manual_seed(seed)
        return Block(1, self.anatomy, weights, dict(self.moments), generator)

    def tensors_left(self, cut: BlockCut) -> int:
        tensors = slice_block(self.state, Plan(self.anatomy, [cut]), cut, torch.float32)
        return sum(t.numel() for n, t in tensors.items() if not n.endswith("_index"))

    def gone(self, inputs: Tensors) -> int:
        """Parameters absent from the file, by making the file's tensors."""
        cut = BlockCut(1, inputs, rows=live_rows(self.anatomy, inputs))
        return self.anatomy.block_parameters - self.tensors_left(cut)

    def columns_gone(self, inputs: Tensors) -> int:
        """The paper's count: p parameters for each input."""
        return sum(
            len(self.state[f"{name}.weight"]) * (self.anatomy.denses[name].inputs - len(kept))
            for name, kept in inputs.items()
        )

    def largest_column(self, names: list[str], *, columns: bool) -> int:
        """Most parameters that can go with one input."""
        found = []
        for name in names:
            dense = self.anatomy.denses[name]
            coupling = self.anatomy.coupling_of(name)
            producers = () if columns or coupling is None else coupling.producers
            rows = [self.anatomy.denses[p] for p in producers]
            found.append(dense.rows + sum(row.inputs + row.bias for row in rows))
        return max(found)


@lru_cache
def sample(name: str) -> Sample:
    model = tiny.make_model(name, layers=3)
    anatomy = describe(model)
    block = model.get_submodule(anatomy.family.blocks)[1]
    tokens = torch.randint(3, tiny.VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    readers = {signal: paths[0] for signal, paths in anatomy.by_signal.items()}
    seen: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with gather_moments(block, readers) as (moments, _), torch.no_grad():
        model(tokens)
    handle.remove()
    return Sample(anatomy, block.state_dict(), moments, seen[0])


def comp(form: Form | None = None, **options: Any) -> Comp:
    """COMP on inputs of layers, its own form, unless another is given."""
    method = get_method("comp", {"denses": "neurons", **options}, form or Form("inputs"))
    assert isinstance(method, Comp)
    return method


def chosen(anatomy: Anatomy, denses: str) -> list[str]:
    signals = {"all": {"attention", "heads", "ffn", "neurons"}, "outputs": {"heads", "neurons"}}
    wanted = signals.get(denses, {"neurons"})
    return [name for name, dense in anatomy.denses.items() if dense.reads in wanted]


# ---- Algorithm 1 -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "order", "grid", "count", "share", "damping"),
    [
        ("llama-gqa-tied", "condition", 64, "file", 0.12, 0.01),
        ("llama-gqa-tied", "condition", 64, "columns", 0.5, 0.01),
        ("llama-gqa-tied", "energy", 8, "file", 0.35, 0.01),
        ("llama-gqa-tied", "obs", 16, "file", 0.6, 0.1),
        ("llama-gqa-tied", "random", 64, "file", 0.3, 0.01),
        ("llama-gqa-tied", "condition-literal", 8, "columns", 0.3, 0.01),
        ("llama-biases", "condition", 8, "file", 0.4, 0.01),
        ("qwen3", "obs", 8, "file", 0.7, 0.01),
        ("opt", "condition", 64, "file", 0.2, 0.01),
        ("opt", "obs", 8, "columns", 0.5, 0.01),
        ("opt", "energy", 16, "file", 0.4, 0.001),
        ("opt", "random", 8, "file", 0.6, 0.01),
        ("opt", "condition-literal", 16, "file", 0.3, 0.01),
    ],
)
def test_cut_equals_the_literal_algorithm(
    name: str, order: str, grid: int, count: str, share: float, damping: float
) -> None:
    one = sample(name)
    method = comp(
        denses="all", allocation="variance", order=order, grid=grid, count=count, damping=damping
    )
    quota = round(share * one.anatomy.block_parameters)
    cut = method.cut(one.block(seed=5), quota)

    grams, orders, counts_grid = {}, {}, {}
    generator = torch.Generator().manual_seed(5)
    for path, dense in one.anatomy.denses.items():
        g = gram(one.state[f"{path}.weight"], one.moments[dense.reads].covariance)
        scores = importance(order, g, damping=1e-4, generator=generator)  # type: ignore[arg-type]
        grams[path] = g.numpy()
        orders[path] = np.argsort(scores.numpy(), kind="stable")
        step = max(1, dense.inputs // grid)
        counts_grid[path] = [*range(0, dense.inputs - 1, step), dense.inputs - 1]

    def removed(counts: Mapping[str, int]) -> int:
        inputs = {n: torch.as_tensor(np.sort(orders[n][c:])) for n, c in counts.items() if c}
        return one.gone(inputs) if count == "file" else one.columns_gone(inputs)

    literal = literal_neuron_stage(grams, orders, counts_grid, damping, removed, quota)
    assert "not_tuned" not in cut.notes
    moved = {path for path, (kept, _) in literal.items() if len(kept) < len(orders[path])}
    assert cut.inputs.keys() == cut.scales.keys() == moved
    for path in moved:
        kept, scales = literal[path]
        assert cut.inputs[path].tolist() == kept.tolist()
        np.testing.assert_allclose(cut.scales[path].numpy(), scales, atol=1e-5, rtol=1e-5)


def test_the_literal_algorithm_may_start_over_and_know_its_roots() -> None:
    """What the bench varies to be fair in time changes nothing in the result."""
    one = sample("llama-gqa-tied")
    grams, orders, counts_grid, roots = {}, {}, {}, {}
    for path in ("self_attn.o_proj", "mlp.down_proj"):
        dense = one.anatomy.denses[path]
        g = gram(one.state[f"{path}.weight"], one.moments[dense.reads].covariance).numpy()
        grams[path], orders[path] = g, np.argsort(np.diag(g), kind="stable")
        counts_grid[path] = [*range(0, dense.inputs - 1, 4), dense.inputs - 1]
        roots[path] = np.linalg.cholesky(g + 1e-12 * np.trace(g) * np.eye(len(g))).T

    def removed(counts: Mapping[str, int]) -> int:
        return sum(counts.values())

    plain = literal_neuron_stage(grams, orders, counts_grid, 0.01, removed, 37)
    assert sum(len(orders[n]) - len(kept) for n, (kept, _) in plain.items()) == 37
    for options in ({"restart": True}, {"roots": roots}, {"tolerance": 1e-9}):
        other = literal_neuron_stage(grams, orders, counts_grid, 0.01, removed, 37, **options)
        assert other.keys() == plain.keys()
        for path, (kept, scales) in plain.items():
            assert other[path][0].tolist() == kept.tolist()
            np.testing.assert_allclose(other[path][1], scales, atol=1e-6)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt"])
@pytest.mark.parametrize(
    ("order", "denses", "allocation"), list(itertools.product(ORDERS, DENSES, ALLOCATIONS))
)
def test_the_quota_is_reached_within_one_column(
    name: str, order: str, denses: str, allocation: str
) -> None:
    one = sample(name)
    names = chosen(one.anatomy, denses)
    least = {n: torch.arange(1) for n in names}
    for count, share in (("file", 0.15), ("file", 0.85), ("columns", 0.4)):
        by_columns = count == "columns"
        measure = one.columns_gone if by_columns else one.gone
        quota = round(share * measure(least))
        method = comp(order=order, denses=denses, allocation=allocation, count=count)
        cut = method.cut(one.block(), quota)
        assert set(cut.inputs) <= set(names)
        assert all(len(kept) >= 1 for kept in cut.inputs.values())
        column = one.largest_column(names, columns=by_columns)
        assert abs(measure(cut.inputs) - quota) <= column / 2
        assert cut.rows.keys() == live_rows(one.anatomy, cut.inputs).keys()


@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt"])
@pytest.mark.parametrize("denses", DENSES)
def test_tuned_cuts_lose_less_than_untuned_ones(name: str, denses: str) -> None:
    one = sample(name)
    quota = round(0.15 * one.anatomy.block_parameters)
    tuned = comp(denses=denses).cut(one.block(), quota)
    plain = comp(denses=denses, tune=False).cut(one.block(), quota)
    assert plain.scales == {}
    assert tuned.inputs.keys() == plain.inputs.keys() == tuned.scales.keys()
    for path, kept in tuned.inputs.items():
        assert torch.equal(kept, plain.inputs[path])
        weight = one.state[f"{path}.weight"]
        moments = one.moments[one.anatomy.denses[path].reads]
        errors = []
        for cut in (tuned, plain):
            alone = BlockCut(1, {path: kept}, {p: s for p, s in cut.scales.items() if p == path})
            change = mask_block(one.state, alone, torch.float32)[f"{path}.weight"] - weight
            errors.append(float((change.double() @ moments.covariance * change).sum()))
        assert errors[0] < errors[1]


def test_noted_error_is_the_error_of_the_layer() -> None:
    one = sample("llama-gqa-tied")
    damping = 1e-6  # so that the pull to 1 does not show
    cut = comp(denses="all", damping=damping).cut(one.block(), 3000)
    assert cut.inputs
    for path in cut.inputs:
        weight = one.state[f"{path}.weight"].double()
        covariance = one.moments[one.anatomy.denses[path].reads].covariance
        alone = BlockCut(1, {path: cut.inputs[path]}, {path: cut.scales[path]})
        change = mask_block(one.state, alone, torch.float32)[f"{path}.weight"] - weight
        relative = (change @ covariance * change).sum() / (weight @ covariance * weight).sum()
        assert cut.notes["error"][path] == pytest.approx(float(relative), rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("denses", DENSES)
def test_no_quota_leaves_the_block_alone(denses: str) -> None:
    one = sample("llama-gqa-tied")
    assert comp(denses=denses).cut(replace(one.block(), moments={}), 0) == BlockCut(1)


def test_a_cut_does_not_change_what_it_was_given() -> None:
    one = sample("opt")
    before = {k: v.clone() for k, v in one.state.items()}
    sums = {k: (m.second.clone(), m.total.clone()) for k, m in one.moments.items()}
    comp(denses="all", order="energy").cut(one.block(), 2000)
    assert all(torch.equal(v, one.state[k]) for k, v in before.items())
    for key, (second, total) in sums.items():
        assert torch.equal(second, one.moments[key].second)
        assert torch.equal(total, one.moments[key].total)


@pytest.mark.parametrize("order", ORDERS)
def test_the_same_seed_gives_the_same_cut(order: str) -> None:
    one = sample("llama-gqa-tied")
    method = comp(order=order, denses="all")
    first, second, other = (method.cut(one.block(seed), 2500) for seed in (1, 1, 2))
    flat, again = first.tensors(), second.tensors()
    assert flat.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in flat.items())
    assert first.notes == second.notes
    differs = other.tensors()
    same = flat.keys() == differs.keys() and all(torch.equal(flat[k], differs[k]) for k in flat)
    assert same == (order != "random")


# ---- odd statistics --------------------------------------------------------------------------


def ffn_block(second: torch.Tensor) -> Block:
    """A block of which only the FFN's last layer matters, with a given G: its columns are alike."""
    one = sample("llama-gqa-tied")
    weights = {"mlp.down_proj": torch.full((32, 48), 32**-0.5)}
    moments = {"neurons": Moments(second, torch.zeros(48).double(), 1)}
    return replace(one.block(), weights=weights, moments=moments)


def test_scales_outside_of_the_guard_band_fall_back_to_one_and_are_noted() -> None:
    # All neurons say the same, so that those that stay would have to shout.
    neurons, kept = 48, 4
    assert neurons / kept > GUARD
    quota = (neurons - kept) * 3 * 32
    method = comp(order="energy", damping=1e-6)
    cut = method.cut(ffn_block(torch.ones(48, 48).double()), quota)
    assert cut.inputs["mlp.down_proj"].tolist() == [44, 45, 46, 47]
    assert cut.scales["mlp.down_proj"].tolist() == [1.0] * kept
    assert cut.notes["not_tuned"] == ["mlp.down_proj"]
    calm = method.cut(ffn_block(torch.ones(48, 48).double()), 24 * 3 * 32)
    assert "not_tuned" not in calm.notes
    assert calm.scales["mlp.down_proj"].tolist() == pytest.approx([2.0] * 24, rel=1e-4)


def test_more_damping_is_noted() -> None:
    second = torch.ones(48, 48).double()
    second[0, 1] = second[1, 0] = 1.05  # no second moment, but rounding may leave such a one
    cut = comp(order="energy", damping=1e-3).cut(ffn_block(second), 960)
    assert cut.notes["more_damping"]["mlp.down_proj"] == pytest.approx(0.1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_dead_layer_is_cut_without_a_word(order: str, allocation: str) -> None:
    quota = 24 * 3 * 32
    cut = comp(order=order, allocation=allocation).cut(
        ffn_block(torch.zeros(48, 48).double()), quota
    )
    assert len(cut.inputs["mlp.down_proj"]) == 24
    assert cut.scales["mlp.down_proj"].tolist() == [1.0] * 24


@pytest.mark.parametrize("order", ["condition", "obs", "energy"])
def test_dead_neurons_go_first(order: str) -> None:
    x = torch.randn(400, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, ::2] = 0
    cut = comp(order=order).cut(ffn_block(x.T @ x / 400), 24 * 3 * 32)
    assert cut.inputs["mlp.down_proj"].tolist() == list(range(1, 48, 2))
    assert cut.scales["mlp.down_proj"].tolist() == pytest.approx([1.0] * 24)
    assert cut.notes["error"]["mlp.down_proj"] < 0.02


def test_statistics_that_are_not_finite_are_refused() -> None:
    for order in ("condition", "energy"):
        with pytest.raises(ArithmeticError):
            comp(order=order).cut(ffn_block(torch.full((48, 48), torch.nan).double()), 960)


# ---- which layers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "denses", "layers", "signals"),
    [
        ("qwen2", "neurons", ["mlp.down_proj"], {"neurons"}),
        ("qwen2", "outputs", ["self_attn.o_proj", "mlp.down_proj"], {"heads", "neurons"}),
        ("opt", "neurons", ["fc2"], {"neurons"}),
        ("opt", "outputs", ["self_attn.out_proj", "fc2"], {"heads", "neurons"}),
        (
            "opt",
            "all",
            [*(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")), "fc1", "fc2"],
            {"attention", "heads", "ffn", "neurons"},
        ),
        (
            "mistral",
            "all",
            [
                *(f"self_attn.{n}_proj" for n in "qkvo"),
                *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
            ],
            {"attention", "heads", "ffn", "neurons"},
        ),
    ],
)
def test_denses(name: str, denses: str, layers: list[str], signals: set[str]) -> None:
    one = sample(name)
    method = comp(denses=denses)
    assert method.signals(one.anatomy) == signals
    most = one.gone({layer: torch.arange(1) for layer in layers})
    moments = {signal: one.moments[signal] for signal in signals}  # it needs no others
    cut = method.cut(replace(one.block(), moments=moments), round(0.7 * most))
    assert sorted(cut.inputs) == sorted(layers)


def test_columns_and_file_count_differently() -> None:
    one = sample("opt")
    quota = 20 * 32
    by_columns = comp(count="columns").cut(one.block(), quota)
    by_file = comp(count="file").cut(one.block(), quota)
    assert len(by_columns.inputs["fc2"]) == 64 - 20
    # With an input of fc2 goes a row of fc1 and its bias: 65 parameters for each.
    assert len(by_file.inputs["fc2"]) == 64 - round(20 * 32 / 65)


# ---- whole blocks and shares -----------------------------------------------------------------


def test_layer_importance_is_one_minus_the_mean_cosine() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 7, 16))
    y += x
    total = 0.0
    for window in range(3):
        for token in range(7):
            a, b = x[window, token], y[window, token]
            total += a @ b / np.sqrt((a @ a) * (b @ b))
    found = comp().layer_importance(torch.as_tensor(x).float(), torch.as_tensor(y).float())
    assert found == pytest.approx(1 - total / 21, abs=1e-6)


def test_a_block_that_only_scales_has_no_importance() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert comp().layer_importance(x, 3 * x) == pytest.approx(0, abs=1e-6)
    assert comp().layer_importance(x, -x) == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "most", "counts"),
    [
        ({}, 9, [0, 1, 2, 3, 4]),
        ({}, 2, [0, 1, 2]),
        ({}, 0, [0]),
        ({"max_layers": 1}, 9, [0, 1]),
        ({"layers": 0}, 3, [0]),
        ({"layers": 3}, 3, [3]),
        ({"layers": 3, "max_layers": 1}, 3, [3]),
    ],
)
def test_layer_counts(options: dict[str, Any], most: int, counts: list[int]) -> None:
    assert list(comp(**options).layer_counts(most)) == counts


def test_more_blocks_than_the_share_is_worth_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"layers is 3.*at most 2 blocks: lower --layers"):
        comp(layers=3).layer_counts(2)


FULL = {"exempt_first": 0, "exempt_last": 0}


def capacity(denses: str = "neurons", cap: float = 0.85, *, columns: bool = False) -> int:
    one = sample("llama-gqa-tied")
    least = {name: torch.arange(1) for name in chosen(one.anatomy, denses)}
    return int(cap * (one.columns_gone(least) if columns else one.gone(least)))


def quotas(total: int, importances: dict[int, float], **options: Any) -> dict[int, int]:
    return comp(**options).quotas(sample("llama-gqa-tied").anatomy, importances, total)


def test_quotas_are_in_proportion_to_one_over_importance() -> None:
    importances = {0: 0.3, 2: 0.2, 3: 0.6, 5: 0.25}
    found = quotas(5000, importances, **FULL)
    whole = sum(1 / i for i in importances.values())
    assert sum(found.values()) == 5000
    assert list(found) == list(importances)
    for layer, quota in found.items():
        assert abs(quota - 5000 / importances[layer] / whole) < 1


def test_first_and_last_blocks_are_exempt() -> None:
    importances = {0: 0.3, 2: 0.2, 3: 0.6, 5: 0.25, 6: 0.1}
    found = quotas(3001, importances, shares="uniform", exempt_first=2, exempt_last=1)
    assert found == {0: 0, 2: 0, 3: 1501, 5: 1500, 6: 0}
    found = quotas(3000, importances, shares="uniform", exempt_first=1, exempt_last=2)
    assert found == {0: 0, 2: 1500, 3: 1500, 5: 0, 6: 0}


@pytest.mark.parametrize(
    ("of_32", "depth", "spared"),
    [(2, 32, 2), (2, 80, 2), (2, 30, 2), (2, 12, 1), (2, 5, 0), (1, 16, 0), (1, 24, 1), (4, 12, 2)],
)
def test_few_blocks_spare_fewer(of_32: int, depth: int, spared: int) -> None:
    assert exempt("auto", of_32, depth) == spared
    assert exempt(3, of_32, depth) == 3


@pytest.mark.parametrize(("first", "last"), [(4, 0), (0, 4), (0, 5), (9, 0), (2, 3), (3, 9)])
def test_nothing_can_go_where_all_blocks_are_exempt(first: int, last: int) -> None:
    importances = dict.fromkeys(range(4), 0.5)
    options = {"exempt_first": first, "exempt_last": last}
    assert quotas(0, importances, **options) == dict.fromkeys(range(4), 0)
    with pytest.raises(RecipeError, match="leave 0 blocks"):
        quotas(1, importances, **options)


def test_a_full_block_passes_its_share_on() -> None:
    most = capacity()
    found = quotas(most + 900, {0: 0.001, 1: 0.2, 2: 0.1}, **FULL)
    assert found == {0: most, 1: 300, 2: 600}


def test_a_block_that_changes_nothing_does_not_break_the_shares() -> None:
    for none in (0.0, -1e-9):
        found = quotas(1000, {0: none, 1: 0.2}, **FULL)
        assert sum(found.values()) == 1000
        assert found[0] > 990


@pytest.mark.parametrize("denses", DENSES)
@pytest.mark.parametrize("cap", [0.5, 0.85])
@pytest.mark.parametrize("count", ["file", "columns"])
def test_the_most_that_blocks_can_lose(denses: str, cap: float, count: str) -> None:
    options = {**FULL, "denses": denses, "cap": cap, "count": count}
    most = capacity(denses, cap, columns=count == "columns")
    importances = {0: 0.2, 1: 0.9, 2: 0.1}
    assert quotas(3 * most, importances, **options) == dict.fromkeys(range(3), most)
    with pytest.raises(RecipeError) as caught:
        quotas(3 * most + 1, importances, **options)
    text = str(caught.value)
    assert text.startswith(
        f"{3 * most + 1:,} parameters should leave 3 blocks, which can lose at most {3 * most:,}: "
    )
    for way_out in ("ask for less", "--layers", "denses: all", "exempt_first", "exempt_last"):
        assert way_out in text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 2), min_size=1, max_size=12),
    st.integers(0, 3),
    st.integers(0, 3),
    st.floats(0, 1),
    st.sampled_from(["importance", "uniform"]),
)
def test_quotas_always_sum_and_fit(
    values: list[float], first: int, last: int, share: float, shares: str
) -> None:
    most = capacity()
    free = max(0, len(values) - first - last)
    total = int(share * free * most)
    options = {"exempt_first": first, "exempt_last": last, "shares": shares}
    found = quotas(total, dict(enumerate(values)), **options)
    assert sum(found.values()) == total
    assert all(0 <= quota <= most for quota in found.values())
    exempt = [i for i in range(len(values)) if i < first or i >= len(values) - last]
    assert all(found[i] == 0 for i in exempt)
    if shares == "importance":  # the less important block never loses less, up to rounding
        open_to = sorted(set(range(len(values))) - set(exempt), key=lambda i: -values[i])
        lost = [found[i] for i in open_to]
        assert all(b >= a - 1 for a, b in itertools.pairwise(lost))


# ---- options ---------------------------------------------------------------------------------


def test_comp_is_known_by_its_name() -> None:
    assert "comp" in method_names()
    with pytest.raises(RecipeError, match=r"method magic is not known: choose one of .*comp"):
        get_method("magic", {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampning": 1}, r"option of method comp dampning is not known: allowed are .*damping"),
        ({"damping": 0}, r"damping is 0: .*greater than 0"),
        ({"order_damping": -1}, r"order_damping is -1"),
        ({"cap": 1}, r"cap is 1: .*less than 1"),
        ({"cap": 0}, r"cap is 0"),
        ({"grid": 3}, r"grid is 3"),
        ({"denses": "some"}, r"denses is 'some': .*'all', 'outputs' or 'neurons'"),
        ({"order": "size"}, r"order is 'size'"),
        ({"allocation": "fair"}, r"allocation is 'fair'"),
        ({"shares": "even"}, r"shares is 'even'"),
        ({"inputs": "cut"}, r"inputs is 'cut'"),
        ({"count": "all"}, r"count is 'all'"),
        (
            {"layers": "some"},
            r"comp layers is 'some': .*valid integer.*, or Input should be 'auto'",
        ),
        ({"exempt_first": -1}, r"exempt_first is -1"),
        ({"exempt_last": 0.5}, r"exempt_last is 0.5"),
        ({"max_layers": -1}, r"max_layers is -1"),
        ({"layers": -1}, r"comp layers is -1: .*greater than or equal to 0"),
        ({"tune": "perhaps"}, r"tune is 'perhaps'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        get_method("comp", options)


def test_statistics_come_from_the_uncut_model_unless_asked() -> None:
    assert comp().identical_inputs
    assert not comp(inputs="sequential").identical_inputs
