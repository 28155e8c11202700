"""What happens along directions of the parameters, and the linear models whose dimension is known."""

import numpy as np
import pytest
import torch

from prm_hf.diagnostics import (
    Curvature,
    effective_dimension,
    loss_surface,
    perturb,
    plot_double_descent,
    plot_loss_surface,
    plot_perturbation,
    plot_spectral_density,
    posterior_contraction,
    random_features,
    spectral_density,
)
from prm_hf.diagnostics.plots import to_png

from .recorded import read, recorded_mlp


@pytest.fixture(scope="module")
def mlp():
    model, rows, _ = recorded_mlp()
    found = effective_dimension(model, rows, method="exact", loss="classification", batch_size=60)
    return model, Curvature(model, rows, loss="classification", batch_size=40), found


def test_predictions_change_along_eigenvectors_and_not_beside_them(mlp):
    model, curvature, found = mlp
    before = {name: p.clone() for name, p in model.named_parameters()}
    steps = perturb(curvature, found.eigenvectors[:, :16], [0.1, 1.0, 3.0], trials=6)
    assert steps.changed_along.shape == steps.loss_orthogonal.shape == (3, 6)
    assert steps.changed_along[-1].mean() > 3 * steps.changed_orthogonal[-1].mean()
    assert steps.loss_along[-1].mean() > 10 * steps.loss_orthogonal[-1].mean()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    again = perturb(curvature, found.eigenvectors[:, :16], [0.1, 1.0, 3.0], trials=6)
    np.testing.assert_array_equal(steps.changed_along, again.changed_along)


def test_a_step_is_as_long_as_it_says_and_orthogonal(mlp, monkeypatch):
    _, curvature, found = mlp
    seen = []
    monkeypatch.setattr(curvature, "loss_at", lambda offset: seen.append(offset) or 0.0)
    top = found.eigenvectors[:, :5]
    perturb(curvature, top, [0.5], trials=1)
    within, beside = seen
    assert within.norm() == pytest.approx(0.5) == beside.norm()
    torch.testing.assert_close(top @ (top.T @ within), within)
    assert (top.T @ beside).abs().max() < 1e-12


def test_the_loss_on_a_plane(mlp):
    model, curvature, found = mlp
    top = found.eigenvectors[:, :2]
    surface = loss_surface(curvature, top, radius=1e-2, points=3)
    assert surface.losses[1, 1] == pytest.approx(found.loss, abs=1e-15)
    # The second difference along an eigenvector of the Hessian is its eigenvalue
    _, rows, _ = recorded_mlp()
    hessian = effective_dimension(model, rows, kind="hessian", method="exact", loss="classification", batch_size=60)
    surface = loss_surface(curvature, hessian.eigenvectors[:, [0, 1]], radius=1e-3, points=3).losses
    curved = [surface[0, 1] - 2 * surface[1, 1] + surface[2, 1], surface[1, 0] - 2 * surface[1, 1] + surface[1, 2]]
    np.testing.assert_allclose(np.array(curved) / 1e-6, hessian.eigenvalues[:2], rtol=1e-3)


MISTAKES = [
    (lambda c, v: perturb(c, v[:10, :2], [1.0]), "shape \\(10, 2\\): it must be \\(44, k\\)"),
    (lambda c, v: perturb(c, v, [1.0]), "span all parameters"),
    (lambda c, v: perturb(c, v[:, :2], [0.0]), "`scales` is 0.0"),
    (lambda c, v: perturb(c, v[:, :2], [1.0], trials=0), "`trials` is 0"),
    (lambda c, v: loss_surface(c, v[:, :3]), "has 3 columns: a plane has two"),
    (lambda c, v: loss_surface(c, v[:, [0, 0]]), "not linearly independent"),
    (lambda c, v: loss_surface(c, v[:, :2], points=4), "`points` is 4: it must be odd"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes(mlp, call, message):
    _, curvature, found = mlp
    with pytest.raises(ValueError, match=message):
        call(curvature, found.eigenvectors)


def test_a_function_as_loss_has_no_choices():
    model, rows, _ = recorded_mlp()
    curvature = Curvature(model, rows, loss=torch.nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match="A function as `loss` predicts no class"):
        perturb(curvature, torch.eye(44)[:, :2], [1.0])


def test_double_descent_is_the_recorded_one_and_peaks_where_features_are_as_many_as_rows():
    rows = [row for row in read("effdim_random_features")["rows"] if row["d"] in (50, 100, 190, 199, 201, 250)]
    found = random_features([row["d"] for row in rows])
    np.testing.assert_allclose(found.test_error, [row["test_rel_err"] for row in rows], rtol=1e-6)
    np.testing.assert_allclose(found.dimension, [row["effdim_hessian"] for row in rows], rtol=1e-9)
    np.testing.assert_allclose(found.undetermined, [row["effdim_notebook_min_nd_minus"] for row in rows], rtol=1e-6)
    assert found.widths[found.test_error.argmax()] == found.widths[found.undetermined.argmax()] == 199
    peak = random_features([120, 199, 200, 201, 280], n_seeds=3)
    assert abs(peak.widths[peak.test_error.argmax()] - 200) <= 1
    assert peak.train_error[-1] < 1e-10  # interpolated


def test_posteriors_contract_by_the_effective_dimension():
    found = posterior_contraction([1, 5, 20, 100, 1000], n_features=20, precision=2.5, noise=0.5)
    np.testing.assert_allclose(found.contraction, found.dimension / 2.5, rtol=1e-10)
    assert (np.diff(found.dimension) > 0).all()
    assert found.dimension[0] < 1  # one row determines one direction
    assert 19 < found.dimension[-1] < 20


def test_spectral_densities(mlp):
    model, _, found = mlp
    _, rows, _ = recorded_mlp()
    grid, density = spectral_density(found)
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-3)
    assert np.trapezoid(density * grid, grid) == pytest.approx(found.trace / found.n_params, rel=1e-3)
    estimated = effective_dimension(model, rows, method="slq", k=44, n_probes=64, loss="classification", batch_size=60)
    _, smooth = spectral_density(estimated)
    assert np.abs(smooth - density).mean() < 0.15 * density.mean()
    lanczos = effective_dimension(model, rows, k=5, loss="classification", batch_size=60)
    with pytest.raises(ValueError, match="`method` was 'lanczos'"):
        plot_spectral_density(lanczos)


@pytest.mark.slow  # matplotlib looks for fonts first
def test_pictures(mlp):
    _, curvature, found = mlp
    top = found.eigenvectors[:, :2]
    for figure in (
        plot_spectral_density(found.at(0.01)),
        plot_double_descent(random_features([5, 20], n=20, n_seeds=1), 20),
        plot_perturbation(perturb(curvature, top, [0.1, 1.0], trials=2)),
        plot_loss_surface(loss_surface(curvature, top, points=3)),
    ):
        assert to_png(figure, dpi=30).startswith(b"\x89PNG")
