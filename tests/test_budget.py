"""Sharing out a budget and the threshold search, against what they promise."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.solvers.budget import Curve, LazyValues, in_units, share_out, threshold_search

# ---- share_out -------------------------------------------------------------------------------


@st.composite
def budgets(draw: st.DrawFn, most: int = 10**6) -> tuple[int, dict[int, float], dict[int, int]]:
    size = draw(st.integers(1, 12))
    keys = draw(st.lists(st.integers(0, 99), min_size=size, max_size=size, unique=True))
    weights = {i: draw(st.floats(1e-6, 1e6)) for i in keys}
    capacity = {i: draw(st.integers(0, most)) for i in keys}
    total = draw(st.integers(0, sum(capacity.values())))
    return total, weights, capacity


@settings(max_examples=300, deadline=None)
@given(budgets())
def test_parts_are_whole_and_sum_exactly_and_fit(
    budget: tuple[int, dict[int, float], dict[int, int]],
) -> None:
    total, weights, capacity = budget
    parts = share_out(total, weights, capacity)
    assert list(parts) == list(weights)
    assert all(isinstance(part, int) for part in parts.values())
    assert sum(parts.values()) == total
    assert all(0 <= part <= capacity[i] for i, part in parts.items())


@settings(max_examples=100, deadline=None)
@given(budgets(most=10**12))
def test_sums_are_exact_for_the_largest_models(
    budget: tuple[int, dict[int, float], dict[int, int]],
) -> None:
    total, weights, capacity = budget
    parts = share_out(total, weights, capacity)
    assert sum(parts.values()) == total
    assert all(0 <= part <= capacity[i] for i, part in parts.items())


@settings(max_examples=200, deadline=None)
@given(budgets())
def test_one_level_fills_all_that_are_not_full(
    budget: tuple[int, dict[int, float], dict[int, int]],
) -> None:
    """Water-filling: a level v exists with part = min(capacity, v * weight), up to rounding."""
    total, weights, capacity = budget
    parts = share_out(total, weights, capacity)
    low, high = 0.0, 2 * sum(capacity.values()) / min(weights.values()) + 1
    for _ in range(200):
        level = (low + high) / 2
        if sum(min(capacity[i], level * weights[i]) for i in weights) < total:
            low = level
        else:
            high = level
    for i, part in parts.items():
        assert abs(part - min(capacity[i], high * weights[i])) <= 1 + 1e-6 * total


def test_proportional_where_nobody_is_capped() -> None:
    parts = share_out(100, {0: 1.0, 1: 3.0, 2: 6.0}, dict.fromkeys(range(3), 100))
    assert parts == {0: 10, 1: 30, 2: 60}


def test_what_a_full_one_cannot_take_goes_to_the_others_in_proportion() -> None:
    parts = share_out(100, {0: 10.0, 1: 1.0, 2: 3.0}, {0: 20, 1: 100, 2: 100})
    assert parts == {0: 20, 1: 20, 2: 60}


def test_one_overflow_can_cause_the_next() -> None:
    parts = share_out(100, {0: 8.0, 1: 4.0, 2: 1.0}, {0: 30, 1: 40, 2: 100})
    assert parts == {0: 30, 1: 40, 2: 30}


def test_what_rounding_loses_goes_to_the_largest_remainders_then_by_position() -> None:
    assert share_out(10, {0: 1.0, 1: 1.0, 2: 1.0}, dict.fromkeys(range(3), 10)) == {
        0: 4,
        1: 3,
        2: 3,
    }
    assert share_out(2, {5: 1.0, 1: 2.0}, {5: 9, 1: 9}) == {5: 1, 1: 1}


@pytest.mark.parametrize("total", [0, 70])
def test_nothing_and_everything(total: int) -> None:
    capacity = {0: 20, 1: 0, 2: 50}
    parts = share_out(total, {0: 1.0, 1: 9.0, 2: 0.1}, capacity)
    assert parts == (capacity if total else dict.fromkeys(capacity, 0))


def test_nobody_takes_nothing() -> None:
    assert share_out(0, {}, {}) == {}


def test_too_much_is_refused() -> None:
    with pytest.raises(ValueError, match="above"):
        share_out(71, {0: 1.0, 2: 0.1}, {0: 20, 2: 50})
    with pytest.raises(ValueError, match="above"):  # capacity of others does not count
        share_out(30, {0: 1.0}, {0: 20, 2: 50})


# ---- Curve -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "place"), [(0.0, 0), (1e-9, 1), (0.2, 1), (0.3, 3), (0.5, 3), (0.51, 4), (9, 4)]
)
def test_stop_is_the_first_value_that_reaches_the_threshold(threshold: float, place: int) -> None:
    curve = Curve([0, 2, 4, 6, 7], [0.0, 0.2, 0.1, 0.5, 0.4])
    assert curve.stop(threshold) == place


# ---- LazyValues ------------------------------------------------------------------------------


def test_lazy_values_are_a_sequence_computed_once_each() -> None:
    asked: list[int] = []

    def rule(count: int) -> float:
        asked.append(count)
        return count / 10

    values = LazyValues(rule, [0, 2, 4, 7])
    assert len(values) == 4
    assert asked == []
    assert values[1] == 0.2
    assert values[-1] == values[3] == 0.7
    assert values[-3] == 0.2
    assert asked == [2, 7]
    assert values[1:3] == [0.2, 0.4]
    assert list(values) == [0.0, 0.2, 0.4, 0.7]
    assert sorted(asked) == [0, 2, 4, 7]
    for place in (4, -5):
        with pytest.raises(IndexError):
            values[place]


# ---- threshold_search ------------------------------------------------------------------------


class Linear:
    """Parameters gone: so many for each removed input."""

    def __init__(self, costs: Mapping[str, int]) -> None:
        self.costs = costs

    def __call__(self, counts: Mapping[str, int]) -> int:
        return sum(self.costs[name] * count for name, count in counts.items())


@st.composite
def searches(draw: st.DrawFn, *, monotone: bool | None = None) -> tuple[dict[str, Curve], Linear]:
    curves, costs = {}, {}
    rising = draw(st.booleans()) if monotone is None else monotone
    for name in "abcd"[: draw(st.integers(1, 4))]:
        size = draw(st.integers(1, 30))
        step = draw(st.integers(1, 5))
        counts = sorted({*range(0, size - 1, step), 0, size - 1})
        value = st.floats(0, 10) if draw(st.booleans()) else st.integers(0, 3).map(float)
        values = [0.0, *(draw(value) for _ in counts[1:])]
        curves[name] = Curve(counts, sorted(values) if rising else values)
        costs[name] = draw(st.integers(1, 50))
    return curves, Linear(costs)


@settings(max_examples=300, deadline=None)
@given(searches(), st.floats(0, 1))
def test_quota_is_met_within_one_input(case: tuple[dict[str, Curve], Linear], share: float) -> None:
    curves, removed = case
    most = removed({name: curve.counts[-1] for name, curve in curves.items()})
    quota = round(share * most)
    counts, _ = threshold_search(curves, removed, quota)
    assert counts.keys() == curves.keys()
    assert all(0 <= counts[name] <= curve.counts[-1] for name, curve in curves.items())
    # Nearer to the quota than half an input of the layer that moved last.
    assert abs(removed(counts) - quota) <= max(removed.costs.values()) / 2


@settings(max_examples=200, deadline=None)
@given(searches(), st.floats(0, 1))
def test_all_but_the_clipped_one_stop_where_the_threshold_says(
    case: tuple[dict[str, Curve], Linear], share: float
) -> None:
    curves, removed = case
    most = removed({name: curve.counts[-1] for name, curve in curves.items()})
    quota = round(share * most)
    counts, threshold = threshold_search(curves, removed, quota)
    before = math.nextafter(threshold, -math.inf)
    between = []
    for name, curve in curves.items():
        low, high = (curve.counts[curve.stop(t)] for t in (before, threshold))
        assert low <= counts[name] <= high
        if low < counts[name] < high:
            between.append(name)
    assert len(between) <= 1


@settings(max_examples=150, deadline=None)
@given(searches(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_quota_never_raises_a_count_less(
    case: tuple[dict[str, Curve], Linear], one: float, other: float
) -> None:
    curves, removed = case
    most = removed({name: curve.counts[-1] for name, curve in curves.items()})
    small, large = sorted((round(one * most), round(other * most)))
    (few, low), (many, high) = (threshold_search(curves, removed, q) for q in (small, large))
    assert low <= high
    assert removed(few) <= removed(many)
    assert all(few[name] <= many[name] for name in curves)


@settings(max_examples=100, deadline=None)
@given(searches(monotone=True), st.floats(0, 1))
def test_on_rising_curves_no_layer_is_far_ahead(
    case: tuple[dict[str, Curve], Linear], share: float
) -> None:
    """A layer moves on only while its value is the lowest of those that can."""
    curves, removed = case
    most = removed({name: curve.counts[-1] for name, curve in curves.items()})
    counts, threshold = threshold_search(curves, removed, round(share * most))
    for name, curve in curves.items():
        grown = [v for c, v in zip(curve.counts, curve.values, strict=True) if c < counts[name]]
        assert all(value < threshold for value in grown)


@settings(max_examples=80, deadline=None)
@given(searches(), st.floats(0, 1))
def test_lazy_curves_give_the_same_and_look_no_further_than_needed(
    case: tuple[dict[str, Curve], Linear], share: float
) -> None:
    curves, removed = case
    most = removed({name: curve.counts[-1] for name, curve in curves.items()})
    quota = round(share * most)
    asked: dict[str, list[int]] = {name: [] for name in curves}

    def lazy(name: str, curve: Curve) -> Curve:
        known = dict(zip(curve.counts, curve.values, strict=True))

        def rule(count: int) -> float:
            asked[name].append(count)
            return known[count]

        return Curve(curve.counts, LazyValues(rule, curve.counts))

    found = threshold_search({n: lazy(n, c) for n, c in curves.items()}, removed, quota)
    assert found == threshold_search(curves, removed, quota)
    for name, curve in curves.items():
        assert len(set(asked[name])) == len(asked[name])
        last = curve.counts[curve.stop(found[1])]
        assert all(count <= last for count in asked[name])


def test_search_of_nothing_moves_nothing() -> None:
    curves = {"a": Curve([0, 1, 2], [0.0, 0.1, 0.2])}
    assert threshold_search(curves, Linear({"a": 5}), 0) == ({"a": 0}, 0.0)


def test_search_ends_when_there_is_nothing_left_to_remove() -> None:
    curves = {"a": Curve([0, 1, 2], [0.0, 0.1, 0.0]), "b": Curve([0], [0.0])}
    counts, _ = threshold_search(curves, Linear({"a": 5, "b": 7}), 1000)
    assert counts == {"a": 2, "b": 0}


def test_search_ends_without_any_layer() -> None:
    assert threshold_search({}, lambda _: 0, 10) == ({}, 0.0)


def test_flat_curves_are_cut_too() -> None:
    # A dead layer: removing its inputs never costs anything.
    curves = {"a": Curve([0, 4, 8, 9], [0.0, 0.0, 0.0, 0.0])}
    assert threshold_search(curves, Linear({"a": 3}), 12)[0] == {"a": 4}


def test_the_cheapest_goes_first() -> None:
    curves = {
        "dear": Curve([0, 1, 2, 3], [0.0, 0.5, 0.6, 0.7]),
        "cheap": Curve([0, 1, 2, 3], [0.0, 0.1, 0.2, 0.3]),
    }
    counts, threshold = threshold_search(curves, Linear({"dear": 1, "cheap": 1}), 4)
    assert counts == {"dear": 1, "cheap": 3}
    assert threshold == math.nextafter(0.2, math.inf)


def test_a_hill_is_climbed_in_one_step() -> None:
    # Var may fall again; the threshold only rises, so the layer jumps to where it is reached.
    curves = {"a": Curve([0, 1, 2, 3, 4], [0.0, 0.5, 0.1, 0.2, 0.6])}
    for quota, count in ((1, 1), (2, 2), (3, 3), (4, 4)):
        assert threshold_search(curves, Linear({"a": 1}), quota)[0] == {"a": count}


def test_clipping_takes_the_nearer_side() -> None:
    curves = {"a": Curve([0, 10], [0.0, 1.0])}
    removed = Linear({"a": 10})
    assert threshold_search(curves, removed, 34)[0] == {"a": 3}
    assert threshold_search(curves, removed, 36)[0] == {"a": 4}
    assert threshold_search(curves, removed, 35)[0] == {"a": 4}  # a tie goes to the asked share
    assert threshold_search(curves, removed, 4)[0] == {"a": 0}


def test_cost_that_jumps() -> None:
    # Rows that feed several inputs go all at once with the last of them.
    def removed(counts: Mapping[str, int]) -> int:
        return 10 * counts["a"] + 100 * (counts["a"] // 4)

    curves = {"a": Curve([0, 8, 9], [0.0, 1.0, 2.0])}
    assert threshold_search(curves, removed, 35)[0] == {"a": 3}
    assert threshold_search(curves, removed, 130)[0] == {"a": 4}


@given(
    parts=st.dictionaries(st.integers(0, 60), st.integers(0, 10_000), max_size=40),
    unit=st.integers(1, 500),
)
def test_parts_in_units_keep_the_total(parts: dict[int, int], unit: int) -> None:
    rounded = in_units(parts, unit)
    assert rounded.keys() == parts.keys()
    assert all(part % unit == 0 and part >= 0 for part in rounded.values())
    assert all(abs(rounded[name] - parts[name]) <= unit for name in parts)
    given = [part for part in parts.values() if part]
    if given and max(given) - min(given) > 1:
        assert abs(sum(rounded.values()) - sum(parts.values())) <= unit / 2


def test_equal_parts_stay_equal() -> None:
    # share_out leaves parts that differ by one; widths must not.
    assert in_units({0: 0, 1: 1007, 2: 1008, 3: 1007}, 100) == {0: 0, 1: 1000, 2: 1000, 3: 1000}


def test_a_unit_of_one_changes_nothing() -> None:
    assert in_units({3: 7, 5: 11}, 1) == {3: 7, 5: 11}
