"""Means over the data of several processes are those over all the data."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest

import invhvp as ih
from invhvp.operators.data_parallel import data_parallel, gathered
from invhvp.protocols import HasDiagonal
from tests import processes
from tests.backends import Backend
from tests.cases import LAYOUT, N

SHARES = {2: (5, 14), 3: (11, 1, 7)}


def _rows(backend: Backend, size: int) -> tuple[np.ndarray, list[slice]]:
    total = sum(SHARES[size])
    rows = np.random.default_rng(3).standard_normal((total, N)) / np.sqrt(np.arange(1, N + 1))
    rows = np.asarray(rows, dtype=backend.np_dtype).astype(np.float64)
    ends = np.cumsum((0, *SHARES[size]))
    return rows, [slice(int(i), int(j)) for i, j in itertools.pairwise(ends)]


def _shared(backend: Backend, rows: np.ndarray, share: slice, process: Any) -> Any:
    G = ih.DenseGradients(backend.asarray(rows[share]), layout=LAYOUT)
    local = ih.RankOneMean(G)
    return data_parallel(local, share=local.count, processes=process)


@pytest.mark.parametrize("size", [2, 3])
def test_products_and_diagonal_are_those_of_all_samples(backend: Backend, size: int) -> None:
    rows, shares = _rows(backend, size)
    X = backend.asarray(np.random.default_rng(0).standard_normal((N, 4)))

    def work(process: Any) -> tuple[Any, Any, int]:
        A = _shared(backend, rows, shares[process.rank], process)
        assert A.psd
        assert A.layout is LAYOUT
        before = len(process.sums)
        product = A @ X
        assert process.sums[before:] == [(N, 4)]  # one sum for the whole block
        return product, A.diagonal(), A.n_terms

    M = rows.T @ rows / len(rows)
    for product, diagonal, n_terms in processes.run(size, work, backend.scope):
        backend.assert_like(product)
        tolerance = 20 * backend.eps * np.linalg.norm(M)
        np.testing.assert_allclose(
            backend.to_numpy(product), M @ backend.to_numpy(X), atol=4 * tolerance
        )
        np.testing.assert_allclose(backend.to_numpy(diagonal), np.diag(M), atol=tolerance)
        assert n_terms == len(rows)


def test_subsets_are_means_at_the_scale_of_the_whole(backend: Backend) -> None:
    rows, shares = _rows(backend, 3)
    chosen = [[0, 3, 3, 18], [11], [2, 5]]  # of several processes, of one with a single sample

    def work(process: Any) -> list[Any]:
        A = _shared(backend, rows, shares[process.rank], process)
        whole = A @ backend.asarray(np.eye(N))
        return [whole] + [A.subset(np.array(i)) @ backend.asarray(np.eye(N)) for i in chosen]

    for whole, *parts in processes.run(3, work, backend.scope):
        assert whole.shape == (N, N)
        for indices, part in zip(chosen, parts, strict=True):
            expected = rows[indices].T @ rows[indices] / len(indices)
            np.testing.assert_allclose(
                backend.to_numpy(part), expected, atol=100 * backend.eps * np.linalg.norm(expected)
            )


METHODS = {
    "direct": ih.Direct(),
    "sample-space": ih.SampleSpace(),
    "harmonic-mean": ih.InverseHarmonicMean(),
    "cg": ih.CG(rtol=1e-5),
    "block-cg": ih.BlockCG(rtol=1e-5),
    "block-cg-nystroem": ih.BlockCG(rtol=1e-5, preconditioner=ih.NystroemPreconditioner(rank=4)),
    "minres": ih.Minres(rtol=1e-5),
    "lissa": ih.LiSSA(rtol=0.3),
    "arnoldi": ih.Arnoldi(rank=N),
    "nystroem": ih.NystroemSketch(rank=N),
    "jacobi": ih.Jacobi(),
}


@pytest.mark.filterwarnings("ignore::invhvp.ConvergenceWarning")
@pytest.mark.parametrize("name", METHODS)
def test_methods_give_every_process_the_single_answer(backend: Backend, name: str) -> None:
    rows, shares = _rows(backend, 2)
    B = np.random.default_rng(1).standard_normal((N, 3))
    damping, method = 1e-2, METHODS[name]

    def work(process: Any) -> Any:
        A = _shared(backend, rows, shares[process.rank], process)
        return ih.solve(A, backend.asarray(B), method, damping=damping)

    whole = ih.RankOneMean(ih.DenseGradients(backend.asarray(rows)))
    alone = ih.solve(whole, backend.asarray(B), method, damping=damping)
    first, second = processes.run(2, work, backend.scope)
    np.testing.assert_array_equal(backend.to_numpy(first.x), backend.to_numpy(second.x))
    assert first.status == second.status == alone.status
    M = rows.T @ rows / len(rows) + damping * np.eye(N)
    exact = np.linalg.solve(M, B)
    if name in (
        "direct",
        "sample-space",
        "cg",
        "block-cg",
        "block-cg-nystroem",
        "minres",
        "arnoldi",
        "nystroem",
    ):
        error = np.linalg.norm(backend.to_numpy(first.x) - exact) / np.linalg.norm(exact)
        assert error <= np.linalg.cond(M) * max(1e-5, 20 * backend.eps)
    if name == "lissa":  # random batches are the same; steps differ by rounding alone
        gap = backend.to_numpy(first.x) - backend.to_numpy(alone.x)
        assert np.linalg.norm(gap) <= 1e-3 * np.linalg.norm(exact)


def test_a_process_without_samples_takes_part(backend: Backend) -> None:
    rows, _ = _rows(backend, 2)

    def work(process: Any) -> Any:
        local = ih.RankOneMean(ih.DenseGradients(backend.asarray(rows)))
        A = ih.DataParallel(local, share=len(rows) * (1 - process.rank), processes=process)
        return A @ backend.asarray(np.eye(N))

    for found in processes.run(2, work, backend.scope):
        np.testing.assert_allclose(
            backend.to_numpy(found), rows.T @ rows / len(rows), atol=100 * backend.eps
        )


def test_a_diagonal_is_known_where_every_process_knows_its_own(backend: Backend) -> None:
    """Else it is estimated from products, as for one process."""
    d = np.linspace(1.0, 2.0, N)

    def work(process: Any) -> tuple[bool, Any]:
        local = ih.Diagonal(backend.asarray(d), psd=True)
        if process.rank == 1:
            diagonal, like = backend.asarray(d)[:, None], backend.asarray(d)
            local = ih.Callback(lambda X: diagonal * X, N, like=like, psd=True)
        A: Any = data_parallel(local, share=3, processes=process)
        return isinstance(A, HasDiagonal), ih.Jacobi().prepare(A, damping=1.0) @ backend.asarray(d)

    for known, x in processes.run(2, work, backend.scope):
        assert not known
        np.testing.assert_allclose(backend.to_numpy(x), d / (d + 1), rtol=30 * backend.eps)


def test_without_any_sample_it_says_so() -> None:
    def work(process: Any) -> Any:
        return ih.DataParallel(ih.Diagonal(np.ones(2)), share=0, processes=process)

    with pytest.raises(ValueError, match=r"positive sum, got \[0.0, 0.0\]"):
        processes.run(2, work)


def test_memory_that_runs_out_in_one_process_leaves_no_other_waiting() -> None:
    widths: list[int] = []

    def matmat(X: Any) -> Any:
        widths.append(X.shape[1])
        if X.shape[1] > 2:
            raise MemoryError
        return X

    def work(process: Any) -> Any:
        tight = ih.Callback(matmat, 3, like=np.ones(1))
        local = tight if process.rank else ih.Identity(3, like=np.ones(1))
        return ih.DataParallel(local, share=1, processes=process) @ np.eye(3, 8)

    first, second = processes.run(2, work)
    np.testing.assert_array_equal(first, np.eye(3, 8))
    np.testing.assert_array_equal(first, second)
    assert max(widths) == 8
    assert widths.count(2) == 4


@pytest.mark.filterwarnings("ignore::invhvp.ConvergenceWarning")
@pytest.mark.parametrize("method", [ih.CG, ih.BlockCG, ih.LiSSA])
def test_one_clock_stops_all(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(3).standard_normal((40, N)) * np.geomspace(1, 1e-4, N)
    first = threading.local()

    def clock() -> float:  # that of one process runs a hundred times as fast
        first.ticks = getattr(first, "ticks", 0) + 1
        return first.ticks * (100.0 if getattr(first, "fast", False) else 1.0)

    def work(process: Any) -> Any:
        first.fast = process.rank == 1
        local = ih.RankOneMean(ih.DenseGradients(rows))
        shared = ih.DataParallel(local, share=40, processes=process)
        options = {"rtol": 1e-14, "maxiter": 10_000, "max_seconds": 900.0}
        return ih.solve(shared, np.ones(N), method(**options), damping=1e-9)

    monkeypatch.setattr("time.perf_counter", clock)
    slow, fast = processes.run(2, work)
    assert slow.iterations == fast.iterations < 100


@pytest.mark.filterwarnings("ignore::invhvp.ConvergenceWarning")
def test_memory_that_differs_gives_blocks_of_one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, shares = np.random.default_rng(3).standard_normal((19, N)), (slice(5), slice(5, 19))
    own = threading.local()

    def work(process: Any) -> Any:
        own.room = 10**4 if process.rank else 10**9
        G = ih.DenseGradients(rows[shares[process.rank]])
        A = data_parallel(ih.RankOneMean(G), share=len(G), processes=process)
        B = np.random.default_rng(0).standard_normal((N, 12))
        return ih.solve(A, B, damping=0.1), ih.solve_path(A, B, dampings=[1.0, 0.1])

    monkeypatch.setattr("invhvp._backend.free_memory", lambda _: own.room)
    (mine, path), (theirs, other) = processes.run(2, work)
    np.testing.assert_array_equal(mine.x, theirs.x)
    np.testing.assert_array_equal(path[1].x, other[1].x)


def test_gradients_are_gathered_in_their_own_structure(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    sizes, lengths = (3, 2), (4, 2)  # samples, and terms of each
    d = [rng.standard_normal((n, t, 2)) for n, t in zip(sizes, lengths, strict=True)]
    a = [rng.standard_normal((n, t, 3)) for n, t in zip(sizes, lengths, strict=True)]
    e = [rng.standard_normal((n, t, 2)) for n, t in zip(sizes, lengths, strict=True)]
    indices = [rng.integers(5, size=x.shape[:2]) for x in e]
    dense = [rng.standard_normal((n, 4)) for n in sizes]

    def local(rank: int) -> ih.StackedGradients:
        mixed: Any = ih.OuterProductGradients(
            output_grads=backend.asarray(d[rank]), inputs=backend.asarray(a[rank])
        )
        return ih.StackedGradients(
            {
                "outer": mixed,
                "table": ih.EmbeddingGradients(
                    output_grads=backend.asarray(e[rank]),
                    indices=backend.integers(indices[rank]),
                    n_rows=5,
                ),
                "dense": ih.DenseGradients(backend.asarray(dense[rank])),
                "mixed": mixed if rank else ih.DenseGradients(mixed.to_dense()),
            }
        )

    def work(process: Any) -> Any:
        return gathered(local(process.rank), process)

    expected = np.concatenate([backend.to_numpy(local(rank).to_dense()) for rank in (0, 1)])
    for G in processes.run(2, work, backend.scope):
        kinds = [type(block).__name__ for block in G.blocks.values()]
        assert kinds == [
            "OuterProductGradients",
            "EmbeddingGradients",
            "DenseGradients",
            "DenseGradients",
        ]
        np.testing.assert_array_equal(backend.to_numpy(G.to_dense()), expected)


def test_rows_that_share_inputs_are_gathered_with_the_inputs_once(backend: Backend) -> None:
    def local(rank: int, each: int) -> ih.OuterProductGradients:
        n, t = (3, 4) if rank else (2, 5)
        own = np.random.default_rng(rank)
        return ih.OuterProductGradients(
            output_grads=backend.asarray(own.standard_normal((n * each, t, 2))),
            inputs=backend.asarray(own.standard_normal((n, t, 3))),
        )

    for each in ((2, 2), (2, 1)):  # as many rows for each in both processes, or not

        def work(process: Any, each: tuple[int, int] = each) -> Any:
            return gathered(local(process.rank, each[process.rank]), process)

        alone = [local(rank, n) for rank, n in enumerate(each)]
        expected = np.concatenate([backend.to_numpy(G.to_dense()) for G in alone])
        for G in processes.run(2, work, backend.scope):
            assert G.distinct_inputs.shape[0] == (5 if each[0] == each[1] else G.shape[0])
            np.testing.assert_array_equal(backend.to_numpy(G.to_dense()), expected)


def test_streamed_gradients_are_not_gathered() -> None:
    def work(process: Any) -> Any:
        G: Any = ih.DenseGradients(np.eye(2))
        if process.rank:
            G = ih.StreamedGradients(lambda: iter([np.eye(2)]), 2)
        return gathered(G, process)

    with pytest.raises(TypeError, match=r"processes \[1\] stream theirs: raise memory="):
        processes.run(2, work)
