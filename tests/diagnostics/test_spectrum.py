"""Intervals of sums over eigenvalues: they hold what is true, in random cases too."""

import numpy as np
import pytest

from prm_hf.diagnostics.spectrum import (
    Spectrum,
    exact_spectrum,
    gauss_rule,
    interval,
    lanczos_spectrum,
    slq_spectrum,
)


def random_matrix(rng: np.random.Generator, semidefinite: bool) -> np.ndarray:
    """A matrix with a random spectrum: falling fast or slowly, with or without zeros."""
    n = int(rng.integers(12, 40))
    eigenvalues = np.arange(1, n + 1) ** -rng.uniform(0, 3) * 10 ** rng.uniform(-2, 2)
    eigenvalues[int(n * rng.uniform(0.3, 1)) :] *= rng.integers(2)
    if not semidefinite:
        eigenvalues *= rng.choice([-1, 1], n, p=[0.3, 0.7])
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    return (basis * eigenvalues) @ basis.T


@pytest.mark.parametrize(
    ("method", "semidefinite"),
    [
        ("lanczos", True),
        ("lanczos", False),
        ("slq", True),
        pytest.param("slq", False, marks=pytest.mark.slow),
    ],
)
def test_the_interval_holds_the_exact_value_in_100_random_cases(method, semidefinite):
    rng = np.random.default_rng(0)
    widths = []
    for case in range(100):
        matrix = random_matrix(rng, semidefinite)
        n, alpha, k = len(matrix), 10 ** rng.uniform(-3, 1), int(rng.integers(1, 11))
        exact = exact_spectrum(matrix, 1e-15, semidefinite).dimension(alpha)[0]
        eigenvalues = np.linalg.eigvalsh(matrix)
        positive = eigenvalues[eigenvalues > 0]
        assert exact == pytest.approx((positive / (positive + alpha)).sum(), abs=1e-9)
        if method == "lanczos":
            found = lanczos_spectrum(matrix.__matmul__, n, k, 16, 1e-15, n, semidefinite, case)
        else:
            steps = n if not semidefinite else k + 2  # only without negative eigenvalues the error of few is known
            found = slq_spectrum(matrix.__matmul__, n, steps, 16, 1e-15, semidefinite, case, 16)
        value, lower, upper = found.dimension(alpha)
        assert lower - 1e-9 <= exact <= upper + 1e-9
        assert lower <= value <= upper
        widths.append((upper - lower) / n)
    assert np.median(widths) < (0.3 if semidefinite else 0.5)  # an interval of everything would hold it too


def test_what_is_captured_narrows_the_interval():
    matrix = random_matrix(np.random.default_rng(3), True)
    widths = []
    for k in (2, 4, 8):
        _, lower, upper = lanczos_spectrum(matrix.__matmul__, len(matrix), k, 16, 1e-15, 99, True, 0).dimension(0.1)
        widths.append(upper - lower)
    assert widths == sorted(widths, reverse=True)


def test_residuals_and_trace():
    matrix = random_matrix(np.random.default_rng(4), False)
    found = lanczos_spectrum(matrix.__matmul__, len(matrix), 5, 400, 1e-15, 99, False, 0)
    expected = np.linalg.eigvalsh(matrix)
    largest = expected[np.argsort(-np.abs(expected))[:5]]
    np.testing.assert_allclose(found.eigenvalues, np.sort(largest)[::-1], atol=1e-10)
    assert found.n_negative == (largest < 0).sum()
    assert found.residuals.max() < 1e-9
    assert found.trace == pytest.approx(np.trace(matrix), abs=0.1 * np.abs(expected).sum())


def test_residuals_widen_the_interval():
    known = {"trace": 1.0, "rounding": 0.0, "count": 1, "semidefinite": True, "vectors": lambda: np.eye(1)}
    sure = Spectrum(np.array([1.0]), residuals=np.array([0.0]), **known).dimension(1.0)
    unsure = Spectrum(np.array([1.0]), residuals=np.array([0.2]), **known).dimension(1.0)
    assert sure == (0.5, 0.5, 0.5)
    assert unsure[1] <= 0.8 / 1.8 < 1.2 / 2.2 <= unsure[2]


def test_quadrature_counts_negative_eigenvalues():
    rng = np.random.default_rng(5)
    basis, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    matrix = (basis * np.repeat([-1.0, 0.0, 2.0], [10, 10, 20])) @ basis.T
    found = slq_spectrum(matrix.__matmul__, 40, 40, 200, 1e-15, False, 0, 64)
    assert abs(found.n_negative - 10) <= 1
    nodes, weights = found.quadrature.gauss[0]
    assert len(nodes) == 3  # there are three eigenvalues
    assert weights.sum() == pytest.approx(1)


def test_the_rule_of_a_tridiagonal_matrix():
    """Nodes and weights of the Legendre polynomials, as numpy has them."""
    k = np.arange(1, 6)
    nodes, weights = gauss_rule(np.zeros(6), k / np.sqrt(4 * k**2 - 1))
    expected_nodes, expected_weights = np.polynomial.legendre.leggauss(6)
    np.testing.assert_allclose(nodes, expected_nodes, atol=1e-14)
    np.testing.assert_allclose(2 * weights, expected_weights, atol=1e-14)


def test_iterations_that_do_not_converge_say_so(monkeypatch):
    from scipy.sparse.linalg import ArpackNoConvergence

    def never(*args, **kwargs):
        raise ArpackNoConvergence("no", np.zeros(2), np.zeros((5, 2)))

    monkeypatch.setattr("prm_hf.diagnostics.spectrum.eigsh", never)
    with pytest.raises(ValueError, match="found 2 of `k=3` eigenvalues: take a smaller `k`, or `method='slq'`"):
        lanczos_spectrum(np.eye(5).__matmul__, 5, 3, 4, 1e-15, 5, True, 0)


def test_intervals_of_a_trace_hold_it_as_often_as_they_say():
    rng = np.random.default_rng(6)
    bases, missed = [np.linalg.qr(rng.standard_normal((40, 40)))[0] for _ in range(20)], 0
    for i in range(2000):
        n = int(rng.integers(1, 40))
        eigenvalues = np.arange(1, n + 1) ** -rng.uniform(0, 3)
        samples = (rng.choice([-1.0, 1.0], (16, 40)) @ bases[i % 20][:, :n]) ** 2 @ eigenvalues
        low, high = interval(samples, eigenvalues[0])
        missed += not low <= eigenvalues.sum() <= high
    assert missed <= 6  # two are expected of 99.9 %
    assert interval(np.zeros(16), 1.0) == (0.0, 0.0)
