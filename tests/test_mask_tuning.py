"""Tuned masks at every number of removed inputs against a dense least-squares reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from secateur.solvers.gram import gram, ordering
from secateur.solvers.mask_tuning import GUARD, MaskCurve, guarded


@dataclass
class Problem:
    """A layer W (p, q), its inputs x (tokens, q), scores of the inputs (q,)."""

    w: NDArray[np.float64]
    x: NDArray[np.float64]
    scores: NDArray[np.float64]
    damping: float

    @property
    def q(self) -> int:
        return self.w.shape[1]

    @property
    def g(self) -> torch.Tensor:
        x = torch.as_tensor(self.x)
        return gram(torch.as_tensor(self.w), x.T @ x / len(x))

    def curve(self) -> MaskCurve:
        return MaskCurve(ordering(self.g), torch.as_tensor(self.scores), self.damping)

    def reference(self, removed: int) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:
        """Kept inputs, their scales, and the residual relative to that of removing everything."""
        a = np.concatenate([self.w * token for token in self.x]) / np.sqrt(len(self.x))
        pull = np.sqrt(self.damping * np.square(a).sum() / self.q)
        stacked = np.concatenate([a, pull * np.eye(self.q)])
        target = stacked @ np.ones(self.q)
        kept = np.sort(np.argsort(self.scores, kind="stable")[removed:])
        scales = np.linalg.lstsq(stacked[:, kept], target, rcond=None)[0]
        residual = np.square(stacked[:, kept] @ scales - target).sum()
        return kept, scales, residual / np.square(target).sum()


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    q = draw(st.integers(1, 20))
    p = draw(st.integers(1, 6))
    tokens = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w, x = rng.standard_normal((p, q)), rng.standard_normal((tokens, q))
    x = x * np.logspace(0, draw(st.sampled_from([0.0, -1.0, -3.0])), q)
    for _ in range(draw(st.integers(0, 3))):  # inputs that say the same as others
        source, target = rng.integers(q, size=2)
        x[:, target] = x[:, source]
        w[:, target] = w[:, source] * draw(st.sampled_from([1.0, -2.0]))
    for dead in rng.integers(q, size=draw(st.integers(0, 3))):
        (x if draw(st.booleans()) else w)[:, dead] = 0
    if draw(st.booleans()):
        scores = rng.standard_normal(q)
    else:
        scores = rng.integers(3, size=q).astype(float)  # ties
    return Problem(w, x, scores, draw(st.sampled_from([1e-4, 1e-2, 0.3])))


@settings(max_examples=120, deadline=None)
@given(problems())
def test_every_mask_and_error_equals_the_dense_reference(problem: Problem) -> None:
    curve = problem.curve()
    assert len(curve) == problem.q
    if not problem.g.diagonal().any():  # a dead layer has nothing to say about its scales
        for c in range(problem.q):
            np.testing.assert_allclose(curve.tuned(c), np.ones(problem.q - c))
            assert curve.error(c) == pytest.approx(c / problem.q)
        return
    assert curve.damping == problem.damping
    for c in range(problem.q):
        kept, scales, error = problem.reference(c)
        assert curve.kept(c).tolist() == kept.tolist()
        np.testing.assert_allclose(curve.tuned(c), scales, rtol=1e-7, atol=1e-7)
        assert curve.error(c) == pytest.approx(error, rel=1e-7, abs=1e-10)
        assert curve.variance(c) == pytest.approx(float(np.var(scales)), rel=1e-6, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_error_rises_from_nothing_to_all(problem: Problem) -> None:
    curve = problem.curve()
    errors = [curve.error(c) for c in range(problem.q + 1)]
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert errors[-1] == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_nothing_removed_leaves_all_ones(problem: Problem) -> None:
    curve = problem.curve()
    np.testing.assert_allclose(curve.tuned(0), np.ones(problem.q), atol=1e-9)
    assert curve.variance(0) == 0
    assert curve.kept(0).tolist() == list(range(problem.q))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_kept_and_removed_share_out_the_inputs(problem: Problem) -> None:
    curve = problem.curve()
    for c in range(problem.q + 1):
        kept = curve.kept(c).tolist()
        assert kept == sorted(kept)
        assert sorted(kept + curve.order[:c].tolist()) == list(range(problem.q))
        if 0 < c < problem.q:
            assert problem.scores[curve.order[:c]].max() <= problem.scores[kept].min()


@settings(max_examples=40, deadline=None)
@given(problems(), st.data())
def test_tuned_masks_beat_every_other_scale(problem: Problem, data: st.DataObject) -> None:
    curve = problem.curve()
    c = data.draw(st.integers(0, problem.q - 1))
    matrix = problem.g.clone()
    matrix.diagonal().add_(problem.damping * matrix.diagonal().mean())

    def error(scales: torch.Tensor) -> float:
        mask = torch.zeros(problem.q, dtype=torch.float64)
        mask[curve.kept(c)] = scales
        return float((mask - 1) @ matrix @ (mask - 1))

    tuned = curve.tuned(c)
    best = error(tuned)
    nudge = torch.as_tensor(
        np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal(len(tuned))
    )
    for size in (1.0, 1e-2):
        assert best <= error(tuned + size * nudge) + 1e-12 * float(matrix.sum().abs() + 1)
    assert best <= error(torch.ones_like(tuned)) + 1e-12 * float(matrix.sum().abs() + 1)


def test_scores_decide_ties_by_position() -> None:
    g = torch.eye(5, dtype=torch.float64)
    curve = MaskCurve(ordering(g), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]), 0.01)
    assert curve.order.tolist() == [1, 3, 0, 2, 4]


def test_a_twin_takes_over() -> None:
    # Two inputs that are the same: the one that stays is doubled, but for the pull to 1.
    g = torch.ones(2, 2, dtype=torch.float64)
    curve = MaskCurve(ordering(g), torch.tensor([0.0, 1.0]), 1e-6)
    assert float(curve.tuned(1)[0]) == pytest.approx((2 + 1e-6) / (1 + 1e-6))
    assert curve.error(1) == pytest.approx(1e-6 / 2, rel=1e-3)


def test_an_input_without_ties_to_those_removed_stays_at_one() -> None:
    g = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    curve = MaskCurve(ordering(g), torch.tensor([0.0, 1.0, 2.0]), 0.01)
    assert curve.tuned(1).tolist() == pytest.approx([1.0, 1.0])
    assert curve.error(1) == pytest.approx((1 + 0.02) / (6 + 0.06))


def test_more_damping_is_taken_and_told_where_the_asked_one_fails() -> None:
    g = torch.tensor([[1.0, 1.05], [1.05, 1.0]], dtype=torch.float64)  # one eigenvalue is -0.05
    curve = MaskCurve(ordering(g), torch.tensor([0.0, 1.0]), 1e-3)
    assert curve.damping == pytest.approx(0.1)
    assert curve.tuned(0).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("scales", "good"),
    [
        ([1.0, 0.5, -3.0], True),
        ([GUARD, -GUARD], True),
        ([1.0, GUARD * 1.001], False),
        ([-GUARD * 1.001, 1.0], False),
        ([1.0, float("nan")], False),
        ([float("inf")], False),
    ],
)
def test_guarded(scales: list[float], good: bool) -> None:
    given_scales = torch.tensor(scales, dtype=torch.float64)
    found, kept = guarded(given_scales)
    assert kept is good
    assert torch.equal(found, given_scales if good else torch.ones(len(scales)).double())
