"""What a user of torch writes by hand: products by double backward, CG column by column."""

from __future__ import annotations

from typing import Any

import torch


def hessian_product(problem: Any, x: Any, y: Any, v: Any) -> Any:
    """Hv of the mean loss of a batch, the graph built anew each time."""
    parameters = problem.parameters()
    loss = problem.loss(problem.model(x), y)
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    return _flat(torch.autograd.grad(_flat(grads), parameters, v))


def gauss_newton_product(problem: Any, x: Any, y: Any, v: Any) -> Any:
    """Jᵀ H J v of the mean loss of a batch, H that of the loss in the outputs."""
    names = [name for name, _ in problem.model.named_parameters()]

    def outputs(*values: Any) -> Any:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(problem.model, given, (x,))

    values = tuple(q.detach() for q in problem.parameters())
    out, pull = torch.func.vjp(outputs, *values)
    moved = torch.func.jvp(outputs, values, tuple(problem.split(v)))[1]
    slope = torch.func.grad(lambda z: problem.loss(z, y))
    return _flat(pull(*torch.func.vjp(slope, out)[1](moved)))  # H is symmetric


def gradient_rows(problem: Any, x: Any, y: Any) -> Any:
    """Gradients of the samples of a batch, (N, p)."""
    values = {name: q.detach() for name, q in problem.model.named_parameters()}

    def loss(given: Any, a: Any, b: Any) -> Any:
        out = torch.func.functional_call(problem.model, given, (a[None],))
        return problem.loss(out, b[None])

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(values, x, y)
    return torch.cat([found[name].reshape(len(x), -1) for name in values], dim=1)


def _flat(parts: Any) -> Any:
    return torch.cat([part.reshape(-1) for part in parts])


def _summed(of_batch: Any) -> Any:
    def build(problem: Any) -> Any:
        n = len(problem.train[0])

        def product(v: Any) -> Any:
            total = problem.damping * v
            for x, y in problem.loader():
                total = total + of_batch(problem, x, y, v) * (len(x) / n)
            return total

        return product

    return build


def _of_rows(problem: Any) -> Any:
    """Fisher products with all gradients, which are kept."""
    rows = torch.cat([gradient_rows(problem, x, y) for x, y in problem.loader()])
    return lambda v: rows.T @ (rows @ v) / len(rows) + problem.damping * v


def _cg(build: Any, rtol: float) -> Any:
    def prepare(problem: Any) -> Any:
        product = build(problem)

        def solve() -> Any:
            found = []
            for b in problem.gradients():
                x, r = torch.zeros_like(b), b
                p, rho = r, r @ r
                goal = rtol * b.norm()
                for _ in range(10 * len(b)):
                    if r.norm() <= goal:
                        break
                    q = product(p)
                    alpha = rho / (p @ q)
                    x, r = x + alpha * p, r - alpha * q
                    new = r @ r
                    p, rho = r + new / rho * p, new
                found.append(x)
            return torch.stack(found)

        return solve

    return prepare


_HESSIAN, _GAUSS_NEWTON = _summed(hessian_product), _summed(gauss_newton_product)

CONTENDERS = {
    "hessian: CG by hand to 1e-3": _cg(_HESSIAN, 1e-3),
    "hessian: CG by hand to 1e-6": _cg(_HESSIAN, 1e-6),
    "ggn: CG by hand to 1e-3": _cg(_GAUSS_NEWTON, 1e-3),
    "ggn: CG by hand to 1e-6": _cg(_GAUSS_NEWTON, 1e-6),
    "fisher: CG by hand to 1e-3": _cg(_of_rows, 1e-3),
    "fisher: CG by hand to 1e-6": _cg(_of_rows, 1e-6),
}
