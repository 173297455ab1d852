"""A small network with classes, and its dense derivatives by other means than the adapter's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)
N, CLASSES = 11, 3
PARAMS = {
    "hidden": {"w": rng.standard_normal((4, 5)) / 2, "b": np.zeros(5)},
    "out": [rng.standard_normal((5, CLASSES)) / 2],
}
x = rng.standard_normal((N, 4))
y = rng.integers(0, CLASSES, N)
w = rng.random(N)


def params():
    """The parameters as JAX arrays, in the precision that is switched on."""
    return jax.tree_util.tree_map(jnp.asarray, PARAMS)


def model(p, x):
    return jnp.tanh(x @ p["hidden"]["w"] + p["hidden"]["b"]) @ p["out"][0]


def losses(z, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], axis=1)[:, 0]


def cross_entropy(z, y):
    return jnp.mean(losses(z, y))


def flat(v):
    """A vector as parameters: JAX sorts the names, and flattens row by row."""
    return {"hidden": {"b": v[:5], "w": v[5:25].reshape(4, 5)}, "out": [v[25:].reshape(5, 3)]}


def vector():
    hidden = PARAMS["hidden"]
    return jnp.asarray(np.concatenate([hidden["b"], hidden["w"].ravel(), PARAMS["out"][0].ravel()]))


@jax.jit
def references(v, weight):
    """Hessian, Gauss-Newton matrix, gradients and outputs of the weighted mean loss."""
    share = weight / weight.sum()
    H = jax.hessian(lambda v: jnp.sum(share * losses(model(flat(v), x), y)))(v)
    J = jax.jacobian(lambda v: model(flat(v), x))(v)
    p = jax.nn.softmax(model(flat(v), x))
    curvature = p[:, :, None] * jnp.eye(CLASSES) - p[:, :, None] * p[:, None, :]
    K = jnp.einsum("n,nap,nab,nbq->pq", share, J, curvature, J)
    G = jax.jacobian(lambda v: losses(model(flat(v), x), y))(v)
    return H, K, G
