"""Operators and gradients against dense derivatives, matrix by matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invhvp as ih
import invhvp_jax as ij
from tests.adapters.invhvp_jax import problems as p

pytestmark = pytest.mark.jax
BATCHES = [(p.x[:4], p.y[:4]), (p.x[4:], p.y[4:])]


def close(A, B, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(A), np.asarray(B), rtol=0, atol=tolerance)


def test_hessian_is_that_of_the_mean_loss_whatever_the_batches():
    H, _, _ = p.references(p.vector(), jnp.ones(p.N))
    A = ij.hessian(p.model, p.cross_entropy, p.params(), BATCHES)
    close(A.to_dense(), H)
    assert A.layout.names == ("hidden.b", "hidden.w", "out.0")
    assert A.layout["hidden.w"].shape == (4, 5)
    assert not A.psd
    assert repr(A).startswith("MeanCurvature(Hessian 40x40, 11 samples in 2 batches, float64")


def test_weights_batch_sizes_and_losses_of_samples():
    H, _, _ = p.references(p.vector(), p.w)
    A = ij.hessian(p.model, p.cross_entropy, p.params(), (p.x, p.y, p.w), batch_size=6)
    close(A.to_dense(), H)

    def batch_loss(params, batch):
        return p.losses(p.model(params, batch["x"]), batch["y"])

    H, _, _ = p.references(p.vector(), jnp.ones(p.N))
    A = ij.hessian(batch_loss=batch_loss, params=p.params(), data={"x": p.x, "y": p.y})
    close(A.to_dense(), H)


def test_gauss_newton_with_rows_and_without():
    data = [tuple(part[rows] for part in (p.x, p.y, p.w)) for rows in (slice(6), slice(6, None))]
    _, K, _ = p.references(p.vector(), p.w)
    rows = ij.gauss_newton(p.model, p.cross_entropy, p.params(), data)
    assert isinstance(rows, ih.RankOneMean)
    assert rows.gradients.shape == (33, 40)
    close(rows.to_dense(), K)
    through = ij.gauss_newton(p.model, p.cross_entropy, p.params(), data, memory=0)
    assert "GaussNewton" in repr(through)
    close(through.to_dense(), K)


def test_gradients_and_empirical_fisher():
    _, _, G = p.references(p.vector(), p.w)
    args = (p.model, p.losses, p.params())
    close(ij.per_sample_gradients(*args, BATCHES, reduction="none").to_dense(), G)
    weighted = ij.per_sample_gradients(*args, (p.x, p.y, p.w), reduction="none")
    close(weighted.to_dense(), G * p.w[:, None])
    assert weighted.layout.names == ("hidden.b", "hidden.w", "out.0")
    F = (G.T * p.w) @ G / p.w.sum()
    held = ij.empirical_fisher(*args, (p.x, p.y, p.w), reduction="none")
    close(held.to_dense(), F)
    streamed = ij.empirical_fisher(*args, (p.x, p.y, p.w), reduction="none", memory=0, batch_size=4)
    assert isinstance(streamed.gradients, ih.StreamedGradients)
    close(streamed.to_dense(), F)


def test_pytrees_to_arrays_and_back():
    params = p.params()
    close(ij.to_array(params), p.vector())
    back = ij.from_array(params, 2 * p.vector())
    assert jax.tree_util.tree_structure(back) == jax.tree_util.tree_structure(params)
    close(back["hidden"]["w"], 2 * params["hidden"]["w"])
    with pytest.raises(ValueError, match=r"shape \(40,\)"):
        ij.from_array(params, jnp.zeros(3))


def test_parameters_of_equinox():
    eqx = pytest.importorskip("equinox")
    layer = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def model(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    A = ij.gauss_newton(model, p.cross_entropy, params, (p.x, p.y))
    assert A.layout.names == ("weight", "bias")
    B = ij.hessian(model, p.cross_entropy, params, (p.x, p.y))
    close(A.to_dense(), B.to_dense(), 1e-6)  # a linear model, made in float32 or float64
    with pytest.raises(TypeError, match=r"equinox\.partition"):
        ij.hessian(model, p.cross_entropy, {"a": p.PARAMS, "n": 3}, (p.x, p.y))


SHIFTED = {
    "a batch of losses": (p.model, p.losses, 'pass reduction="none"'),
    "no mean of losses": (p.model, lambda z, y: p.cross_entropy(z, y) ** 2, "not the mean"),
    "weights of classes": (
        p.model,
        lambda z, y: jnp.sum(p.losses(z, y) * (1.0 + y)) / jnp.sum(1.0 + y),
        "not the mean",
    ),
    "statistics of the batch": (
        lambda q, x: p.model(q, x - jnp.mean(x, axis=0)),
        p.cross_entropy,
        "depends on the other samples",
    ),
    "outputs of no sample": (lambda q, x: p.model(q, x).sum(0), p.cross_entropy, "11 rows"),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_losses_that_are_no_mean_over_samples_are_refused(name):
    model, loss, message = SHIFTED[name]
    with pytest.raises(ValueError, match=message):
        ij.hessian(model, loss, p.params(), (p.x, p.y))


def test_the_door():
    params, args = p.params(), (p.model, p.cross_entropy)
    data = (p.x, p.y)
    with pytest.raises(TypeError, match="data= is missing"):
        ij.hessian(*args, params)
    with pytest.raises(TypeError, match="params= is missing"):
        ij.hessian(*args, data=data)
    with pytest.raises(TypeError, match="either model and loss"):
        ij.hessian(params=params, data=data)
    with pytest.raises(TypeError, match="go together"):
        ij.hessian(loss=p.cross_entropy, params=params, data=data)
    with pytest.raises(TypeError, match="one dtype"):
        ij.hessian(*args, {**params, "out": [params["out"][0].astype("float32")]}, data)
    with pytest.raises(TypeError, match="'out' is int"):
        ij.hessian(*args, {**params, "out": jnp.arange(3)}, data)
    with pytest.raises(ValueError, match="no arrays"):
        ij.hessian(*args, {}, data)
    with pytest.raises(TypeError, match="a tuple"):
        ij.hessian(*args, params, p.x)
    with pytest.raises(ValueError, match="no batches"):
        ij.hessian(*args, params, [])
    with pytest.raises(ValueError, match="same number of rows"):
        ij.hessian(*args, params, (p.x, p.y[:3]))
    with pytest.raises(ValueError, match="batch_size= goes with"):
        ij.hessian(*args, params, BATCHES, batch_size=3)
    with pytest.raises(ValueError, match='"mean", "sum" or "none"'):
        ij.hessian(*args, params, data, reduction="max")
    with pytest.raises(ValueError, match="must not be negative"):
        ij.empirical_fisher(*args, params, (p.x, p.y, p.w - 0.5))
    with pytest.raises(TypeError, match="model and loss"):
        ij.gauss_newton(params=params, data=data)


def test_gauss_newton_names_losses_without_rows():
    def concave(z, y):
        return -jnp.mean(z**2)

    with pytest.raises(ValueError, match="memory=0"):
        ij.gauss_newton(p.model, concave, p.params(), (p.x, p.y))

    def sure(q, x):
        return jax.nn.log_softmax(p.model(q, x))

    def linear(z, y):
        return -jnp.mean(jnp.take_along_axis(z, y[:, None], axis=1))

    with pytest.raises(ValueError, match="linear in the model's outputs"):
        ij.gauss_newton(sure, linear, p.params(), (p.x, p.y))
