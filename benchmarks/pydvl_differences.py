"""Where pyDVL's influence models and ours differ: each against the dense matrix in float64.

A row is one behaviour on one small problem, and the error of either side: the largest entry of the
difference to the exact answer, in units of the largest entry of that answer. pyDVL runs in an
interpreter of its own (INVHVP_PYDVL_PYTHON); without it only our side is measured.

    python -m benchmarks.pydvl_differences
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LAMBDA = 0.05


@dataclass(frozen=True, kw_only=True)
class Row:
    """One behaviour.

    Args:
        what: what is asked for.
        why: why the numbers differ, or "" where they agree.
        model, options: name and options of the influence model, on both sides.
        exact: from the dense problem, factors (n_test, p) that are right.
        batch_size: of the loader that both sides fit on.
        n_test: test samples, which are right-hand sides.
        biased: whether the layers have a bias.
    """

    what: str
    why: str
    model: str
    options: dict[str, Any]
    exact: Callable[[Dense], np.ndarray]
    batch_size: int = 20
    n_test: int = 4
    biased: bool = True


class Dense:
    """A network on random data with all of its matrices; 4 test samples."""

    def __init__(self, *, biased: bool = True) -> None:
        import torch

        from tests.adapters.invhvp_torch import models, references

        rng = torch.Generator().manual_seed(1)
        x = torch.randn((64, 5), generator=rng, dtype=torch.float64)
        y = torch.randint(0, 3, (64,), generator=rng)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = torch.nn.Linear(5, 4, biased), torch.nn.Tanh(), torch.nn.Linear(4, 3, biased)
            self.model = torch.nn.Sequential(*layers).double()
        self.loss = torch.nn.functional.cross_entropy
        optimiser = torch.optim.Adam(self.model.parameters(), lr=2e-2)
        for _ in range(200):
            optimiser.zero_grad()
            self.loss(self.model(x[:60]), y[:60]).backward()
            optimiser.step()
        optimiser.zero_grad()
        self.biased, self.train, self.test = biased, (x[:60], y[:60]), (x[60:], y[60:])
        H, G = models.reference(self.model, self.loss, *self.train)
        self.H, self.G = H.numpy(), G.numpy()
        self.B = models.reference(self.model, self.loss, *self.test)[1].numpy()
        self.F = references.gauss_newton_reference(self.model, self.loss, *self.train).numpy()
        self.E = self.G.T @ self.G / len(self.G)

    def solved(self, M: np.ndarray) -> np.ndarray:
        return np.linalg.solve(M + LAMBDA * np.eye(len(M)), self.B.T).T

    def leading(self, rest: float = 0.0) -> np.ndarray:
        w, V = np.linalg.eigh(self.H)
        kept = np.argsort(-np.abs(w))[:10]
        inverse = np.full(len(w), rest)
        inverse[kept] = 1 / (w[kept] + LAMBDA)
        return ((self.B @ V) * inverse) @ V.T

    def harmonic(self) -> np.ndarray:
        R = [np.linalg.inv(np.outer(g, g) + LAMBDA * np.eye(len(g))) for g in self.G]
        return self.B @ np.mean(R, axis=0)

    def ekfac(self, *, corrected: bool) -> np.ndarray:
        """From the definition: each layer's gradients of every class, as dense arrays."""
        import torch

        x = self.train[0]
        with torch.no_grad():
            h = torch.tanh(self.model[0](x))
            p = torch.softmax(self.model[2](h), 1).numpy()
        out = np.sqrt(p)[:, :, None] * (np.eye(3)[None] - p[:, None, :])
        W = self.model[2].weight.detach().numpy()
        hidden = (out @ W) * (1 - h.numpy()[:, None, :] ** 2)
        matrices = []
        for d, a in ((hidden, x.numpy()), (out, h.numpy())):
            a = np.concatenate([a, np.ones((len(a), 1))], 1) if self.biased else a
            S, A = np.einsum("nco,ncq->oq", d, d) / len(a), a.T @ a / len(a)
            K = np.kron(S, A)
            if corrected:
                U, V = np.linalg.eigh(S)[1], np.linalg.eigh(A)[1]
                values = np.einsum("nco,ni->oi", (d @ U) ** 2, (a @ V) ** 2) / len(a)
                K = (np.kron(U, V) * values.reshape(-1)) @ np.kron(U, V).T
            o, i = d.shape[2], a.shape[1]
            at = np.arange(o * i).reshape(o, i)
            order = np.concatenate([at[:, :-1].reshape(-1), at[:, -1]]) if self.biased else at
            order = order.reshape(-1)
            matrices.append(K[np.ix_(order, order)])
        total = np.zeros_like(self.H)
        n = len(matrices[0])
        total[:n, :n], total[n:, n:] = matrices
        return self.solved(total)


def _rows() -> list[Row]:
    def H(d: Dense) -> np.ndarray:
        return d.solved(d.H)

    def E(d: Dense) -> np.ndarray:
        return d.solved(d.E)

    newton = {"second_order_mode": "gauss_newton"}
    together = {"rtol": 1e-6, "solve_simultaneously": True}
    weights = "the last batch, of one sample, counts as much as the first, of 59"
    points = "the mean depends on how many right-hand sides are passed"
    labels = "the output gradients are not those of labels that the model would give"
    return [
        Row(what="Direct, Hessian", why="", model="DirectInfluence", options={}, exact=H,
            batch_size=59),
        Row(what="Direct, GAUSS_NEWTON, three batches",
            why="the mean is divided by parameters × (batches − 1)", model="DirectInfluence",
            options=newton, exact=E),
        Row(what="CG, Hessian, three equal batches", why="", model="CgInfluence",
            options={"rtol": 1e-6}, exact=H),
        Row(what="CG, Hessian, batches of 59 and 1", why=weights, model="CgInfluence",
            options={"rtol": 1e-6}, exact=H, batch_size=59),
        Row(what="block CG, Hessian, 4 right-hand sides", why="", model="CgInfluence",
            options=together, exact=H),
        Row(what="block CG, Hessian, 1 right-hand side",
            why="it stops after 10 iterations for each right-hand side", model="CgInfluence",
            options=together, exact=H, n_test=1),
        Row(what="block CG, GAUSS_NEWTON, one batch, 4 right-hand sides", why=points,
            model="CgInfluence", options={**together, **newton}, exact=E, batch_size=60),
        Row(what="LiSSA, Hessian, one batch, scale 1, 1000 steps", why="", batch_size=60,
            model="LissaInfluence", options={"scale": 1.0, "maxiter": 1000}, exact=H),
        Row(what="LiSSA, Hessian, batches of 20, scale 10, 1000 steps",
            why="the last of the iterates on random batches is returned, with their noise",
            model="LissaInfluence", options={"scale": 10.0, "maxiter": 1000}, exact=H),
        Row(what="Arnoldi, rank 10", why="", model="ArnoldiInfluence", options={},
            exact=Dense.leading),
        Row(what="Arnoldi, rank 10, Woodbury", why="", model="ArnoldiInfluence",
            options={"use_woodbury": True}, exact=lambda d: d.leading(rest=1 / LAMBDA)),
        Row(what="Nyström, rank 39 of 39, indefinite Hessian",
            why="the sketch is one for positive semidefinite matrices",
            model="NystroemSketchInfluence", options={"rank": 39}, exact=H),
        Row(what="harmonic mean, one batch, 4 right-hand sides", why=points,
            model="InverseHarmonicMeanInfluence", options={}, exact=Dense.harmonic, batch_size=60),
        Row(what="harmonic mean, three batches, 1 right-hand side", why="",
            model="InverseHarmonicMeanInfluence", options={}, exact=Dense.harmonic, n_test=1),
        Row(what="K-FAC", why=labels, model="EkfacInfluence", options={},
            exact=lambda d: d.ekfac(corrected=False)),
        Row(what="EKFAC", why=labels, model="EkfacInfluence", options={"update_diagonal": True},
            exact=lambda d: d.ekfac(corrected=True)),
        Row(what="EKFAC, layers without bias",
            why="the last columns of the weight are taken for the bias; " + labels,
            model="EkfacInfluence", options={"update_diagonal": True}, biased=False,
            exact=lambda d: d.ekfac(corrected=True)),
    ]  # fmt: skip


ROWS = _rows()


def ours(row: Row, dense: Dense) -> np.ndarray:
    """Our factors (n_test, p)."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from invhvp_torch import influence

    data = DataLoader(TensorDataset(*dense.train), batch_size=row.batch_size)
    build = getattr(influence, row.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if row.model == "EkfacInfluence":
            fit = build(dense.model, hessian_regularization=LAMBDA, **row.options)
        else:
            fit = build(dense.model, dense.loss, regularization=LAMBDA, **row.options)
        factors = fit.fit(data).influence_factors(*(t[: row.n_test] for t in dense.test))
    assert isinstance(factors, torch.Tensor)
    return factors.numpy()


def theirs(rows: list[Row], denses: dict[bool, Dense]) -> list[np.ndarray | str] | str:
    """pyDVL's factors of all rows, or why there are none."""
    import torch

    interpreter = os.environ.get("INVHVP_PYDVL_PYTHON")
    if not interpreter:
        return "INVHVP_PYDVL_PYTHON names no interpreter with pyDVL"
    given = [
        {
            "model": row.model,
            "options": row.options,
            "batch_size": row.batch_size,
            "biased": row.biased,
            "lambda": LAMBDA,
            "state": denses[row.biased].model.state_dict(),
            "train": denses[row.biased].train,
            "test": tuple(t[: row.n_test] for t in denses[row.biased].test),
        }
        for row in rows
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    with tempfile.TemporaryDirectory() as folder:
        where, out = Path(folder) / "problem.pt", Path(folder) / "found.npz"
        torch.save(given, where)
        done = subprocess.run(
            [interpreter, "-c", _PYDVL, str(where), str(out)],
            capture_output=True,
            text=True,
            timeout=600,
            env=environment,
            check=False,
        )
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
        said = json.loads(done.stdout.strip().splitlines()[-1])
        found = np.load(out)
        return [said.get(str(i)) or found[str(i)] for i in range(len(rows))]


_PYDVL = """
import json, sys, warnings
import numpy as np, torch
from torch.utils.data import DataLoader, TensorDataset
warnings.simplefilter("ignore")
import pydvl.influence.torch as theirs
found, said = {}, {}
for i, given in enumerate(torch.load(sys.argv[1])):
    b = given["biased"]
    model = torch.nn.Sequential(torch.nn.Linear(5, 4, b), torch.nn.Tanh(), torch.nn.Linear(4, 3, b))
    model = model.double()
    model.load_state_dict(given["state"])
    data = DataLoader(TensorDataset(*given["train"]), batch_size=given["batch_size"])
    options, test = dict(given["options"]), given["test"]
    if "second_order_mode" in options:
        options["second_order_mode"] = theirs.SecondOrderMode(options["second_order_mode"])
    build = getattr(theirs, given["model"])
    torch.manual_seed(0)
    def run(model, data, test):
        if given["model"] == "EkfacInfluence":
            fit = build(model, hessian_regularization=given["lambda"], **options)
        else:
            loss = torch.nn.functional.cross_entropy
            fit = build(model, loss, regularization=given["lambda"], **options)
        return fit.fit(data).influence_factors(*test)
    try:
        try:
            X = run(model, data, test)
        except RuntimeError as error:
            x, y = given["train"]
            data = DataLoader(TensorDataset(x.float(), y), batch_size=given["batch_size"])
            X = run(model.float(), data, (test[0].float(), test[1]))
        found[str(i)] = X.detach().double().numpy()
    except Exception as error:
        said[str(i)] = f"{type(error).__name__}: {error}"[:90]
np.savez(sys.argv[2], **found)
print(json.dumps(said))
"""


def measure() -> list[dict[str, Any]]:
    """Every row with the errors of both sides."""
    denses = {biased: Dense(biased=biased) for biased in (True, False)}
    other = theirs(ROWS, denses)
    found = []
    for i, row in enumerate(ROWS):
        exact = row.exact(denses[row.biased])[: row.n_test]
        mine, their = ours(row, denses[row.biased]), other if isinstance(other, str) else other[i]
        found.append(
            {
                "what": row.what,
                "ours": error(mine, exact),
                "pydvl": None if isinstance(their, str) else error(their, exact),
                "said": their if isinstance(their, str) else "",
                "why": row.why,
            }
        )
    return found


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest entry of the difference, in units of the largest entry of the answer."""
    if found.shape != exact.shape or not np.all(np.isfinite(found)):
        return float("inf")
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def markdown(found: list[dict[str, Any]]) -> str:
    """The table of the page `docs/influence-models.md`."""
    lines = ["| λ = 0.05 | ours | pyDVL 0.10 | why |", "|---|---|---|---|"]
    for row in found:
        their = f"{row['pydvl']:.0e}" if row["pydvl"] is not None else row["said"]
        lines.append(f"| {row['what']} | {row['ours']:.0e} | {their} | {row['why'] or 'agree'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(measure()))
    sys.exit(0)
