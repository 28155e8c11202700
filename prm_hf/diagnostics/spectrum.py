"""What is known of a symmetric matrix's eigenvalues, and what follows for sums over them.

A matrix is a function that multiplies it with float64 vectors, `(n,)` or `(n, m)`. Eigenvectors are scipy's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from scipy.stats import chi2, norm


CONFIDENCE = 0.999  # of what is estimated by random vectors
Product = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Tail:
    """The eigenvalues that are not known one by one.

    Attributes:
        count: at most so many of them are not 0.
        largest: their absolute values are no larger.
        traces: estimates of their sum, one a random vector.
        squares: estimates of the sum of their squares, one a random vector.
    """

    count: int
    largest: float
    traces: np.ndarray
    squares: np.ndarray


@dataclass(frozen=True)
class Quadrature:
    """Lanczos' quadrature from random vectors: each gives nodes and weights, and a sum over eigenvalues of f(λ) is
    about n · Σ w f(x) (Ubaru, Chen, Saad, 2017, https://doi.org/10.1137/16M1104974).

    Attributes:
        gauss: pairs of nodes and weights, one a random vector; weights add up to 1.
        radau: with one node at 0. The functions that are summed here lie between the two if no eigenvalue is negative
            (Golub and Meurant, 2010, chapter 6). None for other matrices.
    """

    gauss: list[tuple[np.ndarray, np.ndarray]]
    radau: list[tuple[np.ndarray, np.ndarray]] | None


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a symmetric matrix, falling.

    Attributes:
        eigenvalues: those that are known, float64 `(k,)`.
        vectors: makes their eigenvectors, `(n, k)`; of few eigenvalues of many parameters they may be large.
        residuals: ‖Hv − λv‖ of each, `(k,)`: an eigenvalue lies that close.
        trace: the sum of all eigenvalues, estimated unless all are known.
        rounding: what is closer to 0 is 0.
        tail, quadrature: the others: one of the two, unless all are known.
        count: how many eigenvalues there are.
        semidefinite: whether none is negative.
    """

    eigenvalues: np.ndarray
    vectors: Callable[[], np.ndarray]
    residuals: np.ndarray
    trace: float
    rounding: float
    count: int
    semidefinite: bool
    tail: Tail | None = None
    quadrature: Quadrature | None = None

    @property
    def n_negative(self) -> int:
        """The negative eigenvalues among those that are known; of all, estimated, with a quadrature."""
        if self.quadrature is not None:
            shares = [weights[nodes < -self.rounding].sum() for nodes, weights in self.quadrature.gauss]
            return round(self.count * float(np.mean(shares)))
        return int((self.eigenvalues < -self.rounding).sum())

    def dimension(self, alpha: float) -> tuple[float, float, float]:
        """Σ λ/(λ+α) over the positive eigenvalues: the value, and the ends of an interval."""
        value, lower, upper = self._dimension(alpha) if self.quadrature is None else self._by_quadrature(alpha)
        return float(value), float(lower), float(upper)

    def _dimension(self, alpha: float) -> tuple[float, float, float]:
        known = self.eigenvalues[self.eigenvalues > 0]
        captured = (known / (known + alpha)).sum()
        # The slope of λ/(λ+α) is nowhere steeper than 1/α
        slopes = alpha / (np.maximum(self.eigenvalues - self.residuals, 0) + alpha) ** 2
        slack = (self.residuals * slopes).sum()
        low, high = (0.0, 0.0) if self.tail is None else self._of_tail(self.tail, alpha)
        lower, upper = max(captured + low - slack, 0.0), captured + high + slack
        return (captured if self.tail is None else (lower + upper) / 2), lower, upper

    def _of_tail(self, tail: Tail, alpha: float) -> tuple[float, float]:
        """Bounds of the sum over the tail's positive eigenvalues, from their sum.

        λ/(λ+α) is concave. So at a given sum it is largest where all are alike, and smallest where each is as large as
        can be or 0.
        """
        if not tail.count:
            return 0.0, 0.0
        low, high = self._trace_of(tail)
        low = min(max(low, 0.0), tail.count * tail.largest)
        high = min(max(high, low), tail.count * tail.largest)
        return low / (tail.largest + alpha), tail.count * high / (high + tail.count * alpha)

    def _trace_of(self, tail: Tail) -> tuple[float, float]:
        """Bounds of the sum of the positive eigenvalues of the tail."""
        if self.semidefinite:
            return interval(tail.traces, tail.largest)
        # Σ|λ| lies between Σλ²/max|λ| and √(n Σλ²), and half of Σ|λ| + Σλ is the sum of the positive ones
        smallest, largest = interval(tail.squares, tail.largest**2)
        half = norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt(2 * largest / len(tail.traces))
        low, high = tail.traces.mean() - half, tail.traces.mean() + half
        absolute = smallest / tail.largest if tail.largest else 0.0
        return max(low, (absolute + low) / 2), (math.sqrt(tail.count * largest) + high) / 2

    def _by_quadrature(self, alpha: float) -> tuple[float, float, float]:
        def sums(rules: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
            positive = [(np.maximum(nodes, 0), weights) for nodes, weights in rules]
            return np.array([self.count * (weights * nodes / (nodes + alpha)).sum() for nodes, weights in positive])

        above = sums(self.quadrature.gauss)
        below = above if self.quadrature.radau is None else sums(self.quadrature.radau)
        largest = max(nodes.max(initial=0.0) for nodes, _ in self.quadrature.gauss)
        largest /= largest + alpha
        value = (above.mean() + below.mean()) / 2
        return value, interval(below, largest)[0], min(interval(above, largest)[1], float(self.count))


def interval(samples: np.ndarray, largest: float) -> tuple[float, float]:
    """An interval of Σλ at `CONFIDENCE`, from samples zᵀAz with random signs z, if all λ are in [0, largest].

    A sample has the mean Σλ and a variance of at most 2Σλ², which is at most 2·largest·Σλ. And at a given mean it
    varies most where only one λ is not 0, in which case it is about Σλ times a χ² of one degree of freedom.
    """
    n, mean = len(samples), max(float(samples.mean()), 0.0)
    ends = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    spread = norm.ppf(ends[1]) ** 2 * 2 * largest / n
    middle, half = mean + spread / 2, math.sqrt(spread * mean + spread**2 / 4)
    of_one, of_one_at_most = mean * n / chi2.ppf(ends[1], n), mean * n / chi2.ppf(ends[0], n)
    return max(middle - half, of_one), min(middle + half, of_one_at_most)


def exact_spectrum(matrix: np.ndarray, eps: float, semidefinite: bool) -> Spectrum:
    """All eigenvalues of a whole matrix.

    Args:
        eps: relative rounding of the matrix' entries.
    """
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return _of_all(eigenvalues[::-1], lambda: vectors[:, ::-1], len(matrix), eps, semidefinite)


def exact_spectrum_of_rows(rows: np.ndarray, gram: np.ndarray, eps: float) -> Spectrum:
    """The eigenvalues of RᵀR, by RRᵀ: all that are not 0, since R has fewer rows than columns.

    Args:
        gram: RRᵀ, float64.
        eps: relative rounding of R's entries.
    """
    eigenvalues, vectors = np.linalg.eigh(gram)
    eigenvalues, vectors = eigenvalues[::-1], vectors[:, ::-1]
    known = eigenvalues > _rounding(eigenvalues, len(rows), eps)
    scaled = (vectors[:, known] / np.sqrt(eigenvalues[known])).astype(rows.dtype)
    return _of_all(eigenvalues, lambda: rows.T @ scaled, rows.shape[1], eps, semidefinite=True)


def lanczos_spectrum(
    product: Product, n: int, k: int, n_probes: int, eps: float, rank: int, semidefinite: bool, seed: int
) -> Spectrum:
    """The `k` eigenvalues of largest absolute value by `scipy.sparse.linalg.eigsh`, and sums over the others.

    The sums are estimated by random vectors of signs (Hutchinson, 1990) orthogonal to the eigenvectors.

    Raises:
        ValueError: the iteration does not converge.
    """
    rng = np.random.default_rng(seed)
    operator = LinearOperator((n, n), matvec=lambda v: product(v.reshape(-1)), dtype=np.float64)
    # Below the rounding of the products nothing converges
    tolerance = 0 if eps < 1e-12 else 10 * eps
    try:
        eigenvalues, vectors = eigsh(operator, k, which="LM", v0=rng.standard_normal(n), tol=tolerance)
    except ArpackNoConvergence as error:
        raise ValueError(
            f"Lanczos' iteration found {len(error.eigenvalues)} of `k={k}` eigenvalues: take a smaller `k`, or "
            "`method='slq'`."
        ) from error
    order = np.argsort(eigenvalues)[::-1]
    eigenvalues, vectors = eigenvalues[order], vectors[:, order]
    residuals = np.linalg.norm(product(vectors) - vectors * eigenvalues, axis=0)
    largest = (np.abs(eigenvalues) + residuals)[np.abs(eigenvalues).argmin()]
    count = max(min(rank, n) - k, 0)
    tail, trace = None, float(eigenvalues.sum())
    if count:
        probes = _orthogonal_to(vectors, rng.choice([-1.0, 1.0], (n, n_probes)))
        curved = _orthogonal_to(vectors, product(probes))
        tail = Tail(count, float(largest), (probes * curved).sum(axis=0), (curved**2).sum(axis=0))
        trace += float(tail.traces.mean())
    rounding = _rounding(eigenvalues, n, eps)
    return Spectrum(eigenvalues, lambda: vectors, residuals, trace, rounding, n, semidefinite, tail=tail)


def slq_spectrum(
    product: Product, n: int, steps: int, n_probes: int, eps: float, semidefinite: bool, seed: int, at_once: int
) -> Spectrum:
    """Stochastic Lanczos quadrature: `steps` of Lanczos' iteration from each of some random vectors of signs.

    The eigenvalues and residuals are those of the first vector; the small ones have not converged. `at_once` vectors
    go together.
    """
    rng = np.random.default_rng(seed)
    gauss, radau, first = [], [], None
    for start in range(0, n_probes, at_once):
        starts = rng.choice([-1.0, 1.0], (min(at_once, n_probes - start), n))
        for diagonal, beside, basis in _tridiagonalize(product, starts, steps, eps):
            gauss.append(gauss_rule(diagonal, beside[:-1]))
            radau.append(_radau_rule(diagonal, beside, eps) or gauss[-1])
            first = first or (diagonal, beside, basis)
    diagonal, beside, basis = first
    eigenvalues, vectors = np.linalg.eigh(_tridiagonal(diagonal, beside[:-1]))
    eigenvalues, vectors = eigenvalues[::-1], vectors[:, ::-1]
    residuals = np.abs(beside[-1] * vectors[-1])
    trace = n * float(np.mean([(nodes * weights).sum() for nodes, weights in gauss]))
    rule = Quadrature(gauss, radau if semidefinite else None)
    rounding = _rounding(eigenvalues, n, eps)
    return Spectrum(
        eigenvalues, lambda: basis.T @ vectors, residuals, trace, rounding, n, semidefinite, quadrature=rule
    )


def gauss_rule(diagonal: np.ndarray, beside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the quadrature of a tridiagonal matrix (Golub and Welsch, 1969)."""
    nodes, vectors = np.linalg.eigh(_tridiagonal(diagonal, beside))
    return nodes, vectors[0] ** 2


def _radau_rule(diagonal: np.ndarray, beside: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The rule with one more node, at 0; None where the plain rule has a node there, or is exact."""
    matrix, last = _tridiagonal(diagonal, beside[:-1]), beside[-1]
    smallest, largest = np.linalg.eigvalsh(matrix)[[0, -1]]
    if not last or smallest <= _rounding(np.array([largest]), len(diagonal), eps):
        return None
    unit = np.zeros(len(diagonal))
    unit[-1] = last**2
    return gauss_rule(np.append(diagonal, np.linalg.solve(matrix, unit)[-1]), beside)


def _tridiagonalize(
    product: Product, starts: np.ndarray, steps: int, eps: float
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Lanczos' iteration from each row of `starts`, `(m, n)`: diagonal, what is beside it, and the basis `(steps, n)`.

    Each vector is made orthogonal to all before. The last number beside the diagonal leads out of the basis; it is 0
    where the basis holds all there is.
    """
    n = starts.shape[1]
    chains = [_Chain([start / np.linalg.norm(start)]) for start in starts]
    for _ in range(min(steps, n)):
        growing = [chain for chain in chains if not chain.is_complete]
        if not growing:
            break
        products = product(np.stack([chain.basis[-1] for chain in growing], axis=1))
        for chain, vector in zip(growing, products.T, strict=True):
            chain.grow(vector, eps)
    return [(np.array(c.diagonal), np.array(c.beside), np.array(c.basis[: len(c.diagonal)])) for c in chains]


@dataclass
class _Chain:
    """Lanczos' iteration from one vector."""

    basis: list[np.ndarray]
    diagonal: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return bool(self.beside) and not self.beside[-1]

    def grow(self, product: np.ndarray, eps: float) -> None:
        n, size = len(product), np.linalg.norm(product)
        self.diagonal.append(float(product @ self.basis[-1]))
        vector = _orthogonal_to(np.array(self.basis).T, product)
        norm = float(np.linalg.norm(vector))
        ends = len(self.basis) == n or norm <= max(10 * eps * size, _rounding(np.array(self.diagonal), n, eps))
        self.beside.append(0.0 if ends else norm)
        if not ends:
            self.basis.append(vector / norm)


def _orthogonal_to(vectors: np.ndarray, vector: np.ndarray) -> np.ndarray:
    for _ in range(2):  # once leaves the rounding of what it takes away
        vector = vector - vectors @ (vectors.T @ vector)
    return vector


def _tridiagonal(diagonal: np.ndarray, beside: np.ndarray) -> np.ndarray:
    return np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)


def _of_all(
    eigenvalues: np.ndarray, vectors: Callable[[], np.ndarray], n: int, eps: float, semidefinite: bool
) -> Spectrum:
    zeros, rounding = np.zeros_like(eigenvalues), _rounding(eigenvalues, n, eps)
    return Spectrum(eigenvalues, vectors, zeros, float(eigenvalues.sum()), rounding, n, semidefinite)


def _rounding(eigenvalues: np.ndarray, n: int, eps: float) -> float:
    """What the rounding of its entries may make of an eigenvalue that is 0."""
    return float(10 * eps * math.sqrt(n) * np.abs(eigenvalues).max(initial=0.0))
