"""lineax's CG on our operator: a JAX solver that calls PyTorch back for every product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import torch

import invhvp_torch as it

_LARGEST = 50_000  # parameters: every product crosses to NumPy and back


def _cg(build: Any, rtol: float) -> Any:
    def prepare(problem: Any) -> Any:
        n = problem.n_parameters
        if n > _LARGEST:
            msg = f"not tried for p > {_LARGEST:,}: products cross from JAX to PyTorch and back"
            raise ValueError(msg)
        jax.config.update("jax_enable_x64", True)
        M = build(problem.model, problem.loss, problem.train, array_namespace=np)
        # In float32 it takes pᵀAp below 100·n·eps for zero, which ends in NaN for such a λ.
        like = jax.ShapeDtypeStruct((n,), jnp.float64)

        def host(V: Any) -> np.ndarray:
            V = np.asarray(V)  # (k, n) under vmap
            return (M @ V.T.astype(M.dtype)).T + problem.damping * V

        def product(v: Any) -> Any:
            shape = jax.ShapeDtypeStruct(v.shape, v.dtype)
            return jax.pure_callback(host, shape, v, vmap_method="broadcast_all")

        A = lx.FunctionLinearOperator(product, like, lx.positive_semidefinite_tag)
        # Scaled so, its rule is ‖r‖ ≤ rtol for right-hand sides of length one, and ‖step‖ ≤ rtol.
        options = {"norm": lx.internal.rms_norm, "max_steps": 1000}
        cg = lx.CG(rtol=0.0, atol=rtol / n**0.5, **options)

        @jax.jit
        @jax.vmap
        def solved(b: Any) -> Any:
            size = jnp.linalg.norm(b)
            return size * lx.linear_solve(A, b / size, cg, throw=False).value

        block = jax.ShapeDtypeStruct((len(problem.test[0]), n), jnp.float64)
        compiled = solved.lower(block).compile()  # part of the fit: shapes are compiled in

        def solve() -> Any:
            return torch.from_numpy(np.array(compiled(problem.gradients().double().numpy())))

        return solve

    return prepare


CONTENDERS = {
    "hessian: CG to 1e-3 on invhvp's operator": _cg(it.hessian, 1e-3),
    "ggn: CG to 1e-3 on invhvp's operator": _cg(it.gauss_newton, 1e-3),
    "ggn: CG to 1e-6 on invhvp's operator": _cg(it.gauss_newton, 1e-6),
    "fisher: CG to 1e-3 on invhvp's operator": _cg(it.empirical_fisher, 1e-3),
    "fisher: CG to 1e-6 on invhvp's operator": _cg(it.empirical_fisher, 1e-6),
}
