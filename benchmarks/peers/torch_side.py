"""What a user of torch writes by hand: products by double backward, CG column by column."""

from __future__ import annotations

from typing import Any

import torch


def _product(problem: Any) -> Any:
    """One Hessian product over the batches, the graph built anew each time."""
    parameters, n = problem.parameters(), len(problem.train[0])

    def product(v: Any) -> Any:
        total = problem.damping * v
        for x, y in problem.loader():
            loss = problem.loss(problem.model(x), y)
            grads = torch.autograd.grad(loss, parameters, create_graph=True)
            flat = torch.cat([g.reshape(-1) for g in grads])
            found = torch.autograd.grad(flat, parameters, v)
            total = total + torch.cat([h.reshape(-1) for h in found]) * (len(x) / n)
        return total

    return product


def _cg(rtol: float) -> Any:
    def prepare(problem: Any) -> Any:
        product = _product(problem)

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


CONTENDERS = {"hessian: CG by hand to 1e-3": _cg(1e-3), "hessian: CG by hand to 1e-6": _cg(1e-6)}
