"""Operators of other packages come in, ours go out, and solvers keep what SciPy's promise."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as ssl

import invhvp as ih
from invhvp.testing import check_operator
from tests.backends import Backend
from tests.cases import OPERATORS, N, matrix, rows

M = matrix(*np.geomspace(1.0, 0.1, 6))


def installed(name: str) -> Any:
    """The package, whose own import may warn; skipped aloud where it is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


# ------------------------------------------------------------------------------ others come in


@pytest.mark.filterwarnings("ignore::FutureWarning")  # its own
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of its imports
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_curvlinops(dtype: str):
    torch, curvlinops = installed("torch"), installed("curvlinops")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    model = model.to(getattr(torch, dtype))
    x, y = torch.randn(7, 3, dtype=getattr(torch, dtype)), torch.arange(7) % 2
    loss = torch.nn.CrossEntropyLoss()
    theirs = curvlinops.GGNLinearOperator(
        model, loss, list(model.parameters()), [(x, y)], check_deterministic=False
    )
    A = ih.as_operator(theirs, psd=True)
    assert A.dtype == getattr(torch, dtype)
    it = pytest.importorskip("invhvp_torch")
    expected = it.gauss_newton(model, torch.nn.functional.cross_entropy, (x, y)).to_dense()
    check_operator(A, dense=expected.double().numpy(), psd=True)
    solution = ih.solve(A, torch.ones(A.shape[0], dtype=A.dtype), ih.BlockCG(), damping=0.1)
    assert solution.status is ih.Status.CONVERGED
    assert not solution.x.requires_grad


@pytest.mark.parametrize("learned", [False, True])
def test_linear_operator(learned: bool):
    torch, linear_operator = installed("torch"), installed("linear_operator")
    from linear_operator.operators import AddedDiagLinearOperator, DiagLinearOperator

    d = torch.full((6,), 0.5, dtype=torch.float64, requires_grad=learned)
    theirs = AddedDiagLinearOperator(
        linear_operator.to_linear_operator(torch.from_numpy(M.copy())), DiagLinearOperator(d)
    )
    A = ih.as_operator(theirs, psd=True)
    assert not (A @ torch.ones(6, dtype=torch.float64)).requires_grad
    check_operator(A, dense=M + 0.5 * np.eye(6), psd=True)
    with pytest.raises(ValueError, match="square"):
        ih.as_operator(linear_operator.to_linear_operator(torch.ones(2, 6, 6)))


def test_pylops():
    pylops = installed("pylops")
    A = ih.as_operator(pylops.Diagonal(np.arange(1.0, 7.0)) + pylops.MatrixMult(M), psd=True)
    check_operator(A, dense=M + np.diag(np.arange(1.0, 7.0)), psd=True)


@pytest.mark.gpu
@pytest.mark.backends("cupy")
def test_cupyx_comes_in_and_goes_out(backend: Backend):
    import cupyx.scipy.sparse as csp
    import cupyx.scipy.sparse.linalg as csl

    exact = M.astype(backend.np_dtype).astype(np.float64)
    theirs = csp.csr_matrix(backend.asarray(M))
    for foreign in (theirs, csl.aslinearoperator(theirs)):
        A = ih.as_operator(foreign, psd=True)
        backend.assert_like(A @ backend.asarray(np.ones(6)))
        check_operator(A, dense=exact, psd=True)
    A = ih.as_operator(backend.asarray(M), psd=True)
    out = ih.as_cupyx(A)
    X = backend.asarray(rows(3, 6).T)
    np.testing.assert_allclose(backend.to_numpy(out.matmat(X)), backend.to_numpy(A @ X))
    P = ih.as_cupyx(ih.Direct().prepare(A, damping=0.0))
    x, info = csl.cg(out, backend.asarray(np.ones(6)), M=P, maxiter=2)
    assert info == 0
    np.testing.assert_allclose(
        backend.to_numpy(x), np.linalg.solve(exact, np.ones(6)), rtol=1e3 * backend.eps
    )


def test_a_cupyx_matrix_is_told_by_its_module(monkeypatch: pytest.MonkeyPatch):
    """Without a GPU: NumPy stands for CuPy, and a class says that it is cupyx's."""

    class csr_matrix:
        shape, dtype = (6, 6), np.dtype("float32")

        def __matmul__(self, X: Any) -> Any:
            return M.astype(np.float32) @ X

    csr_matrix.__module__ = "cupyx.scipy.sparse._csr"
    cupy = types.ModuleType("cupy")
    asked: list[Any] = []

    def zeros(shape: Any, dtype: Any) -> Any:
        asked.append(dtype)
        return np.zeros(shape, dtype)

    cupy.zeros, cupy.ndarray = zeros, FakeOperator  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    A = ih.as_operator(csr_matrix(), psd=True)
    assert asked == [np.float32]
    np.testing.assert_allclose(A @ np.eye(6, dtype=np.float32), M, rtol=1e-6)


# --------------------------------------------------------------------------------- ours go out


@pytest.mark.parametrize("name", ["callback", "block-diagonal-permuted", "rank-one-mean-wide"])
def test_as_scipy(name: str, backend: Backend):
    A, exact = OPERATORS[name](backend)
    if isinstance(A.like, np.ndarray):
        out = ih.as_scipy(A)
    else:
        with pytest.raises(TypeError, match="transfer=True"):
            ih.as_scipy(A)
        out = ih.as_scipy(A, transfer=True)
    assert isinstance(out, ssl.LinearOperator)
    assert out.shape == A.shape
    assert out.dtype == backend.np_dtype
    tolerance = {"rtol": 0, "atol": 100 * backend.eps * float(np.max(np.abs(exact)))}
    B = rows(3, N).T.astype(backend.np_dtype)
    exact_B = exact @ B.astype(np.float64)
    for found, expected in (
        (out.matmat(B), exact_B),
        (out @ B[:, 0], exact_B[:, 0]),
        (out.matvec(B[:, :1]), exact_B[:, :1]),
        (out.rmatvec(B[:, 0]), exact_B[:, 0]),
        (out.H @ B, exact_B),
    ):
        assert isinstance(found, np.ndarray)
        assert found.dtype == backend.np_dtype
        np.testing.assert_allclose(found, expected, **tolerance)


def test_as_scipy_multiplies_a_block_at_once():
    widths: list[int] = []

    def product(X: np.ndarray) -> np.ndarray:
        widths.append(X.shape[1])
        return M @ X

    out = ih.as_scipy(ih.Callback(product, 6, like=np.zeros(0)))
    out @ np.ones((6, 5))
    out @ np.ones(6)
    assert widths == [5, 1]


def test_as_scipy_converts_what_is_real_and_nothing_else():
    out = ih.as_scipy(ih.as_operator(M.astype(np.float32)))
    assert (out @ np.ones(6)).dtype == np.float32  # SciPy's solvers start in float64
    assert (out @ np.ones(6, dtype=int)).dtype == np.float32
    with pytest.raises(TypeError, match="real"):
        out @ np.ones(6, dtype=complex)


def test_as_scipy_names_the_gpu_way(monkeypatch: pytest.MonkeyPatch):
    from invhvp import _backend

    monkeypatch.setattr(_backend, "is_numpy", lambda x: False)
    monkeypatch.setattr(_backend, "library_name", lambda x: "cupy")
    with pytest.raises(TypeError, match="as_cupyx"):
        ih.as_scipy(ih.as_operator(M))


@pytest.mark.parametrize(
    "method",
    [
        ih.Direct(),
        ih.Jacobi(),
        ih.NystroemPreconditioner(rank=10),
        ih.NystroemSketch(rank=10),
        ih.Arnoldi(rank=10),
    ],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("solver", ["cg", "gmres", "minres", "bicgstab"])
def test_inverses_precondition_scipy(method: Any, solver: str):
    # Ten large eigenvalues in front of two decades of small ones, nearly in the axes.
    spectrum = np.concatenate([np.geomspace(1e3, 10.0, 10), np.geomspace(1.0, 1e-2, 70)])
    A = ih.Dense(np.diag(spectrum) + 1e-4 * matrix(*np.linspace(0.0, 1.0, 80)), psd=True)
    inverse = method.prepare(A, damping=1e-2)
    assert inverse.fixed_spd
    b = np.random.default_rng(0).standard_normal(80)
    damped = A + 1e-2 * ih.Identity(80, like=b)
    solve = getattr(ssl, solver)
    counts = {}
    for preconditioner in (None, ih.as_scipy(inverse)):
        count = [0]

        def product(X: np.ndarray, count: list[int] = count) -> np.ndarray:
            count[0] += X.shape[1]
            return damped @ X

        counted = ih.as_scipy(ih.Callback(product, 80, like=b))
        options = {"callback_type": "pr_norm"} if solver == "gmres" else {}
        x, info = solve(counted, b, M=preconditioner, rtol=1e-10, maxiter=2_000, **options)
        assert info == 0
        counts[preconditioner is None] = count[0]
        reached = np.linalg.norm(b - damped @ x) / np.linalg.norm(b)
        assert reached <= (1e-5 if solver == "minres" else 1e-9)  # MINRES means another norm
    assert counts[False] < counts[True]


# ------------------------------------------------------------- cupyx and the shared pool, without


@dataclass
class FakeOperator:
    """Takes what cupyx's LinearOperator takes; see `test_cupyx_takes_these_arguments`."""

    shape: tuple[int, int]
    matvec: Callable[[Any], Any]
    rmatvec: Callable[[Any], Any] | None = None
    matmat: Callable[[Any], Any] | None = None
    dtype: Any = None
    rmatmat: Callable[[Any], Any] | None = None


def test_as_cupyx_sets_the_block_product(monkeypatch: pytest.MonkeyPatch):
    from invhvp import _backend

    package = types.ModuleType("cupyx.scipy.sparse.linalg")
    package.LinearOperator = FakeOperator  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("cupyx", "cupyx.scipy", "cupyx.scipy.sparse"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "cupyx.scipy.sparse.linalg", package)
    A = ih.as_operator(M)
    with pytest.raises(TypeError, match="CuPy arrays, this one works on numpy"):
        ih.as_cupyx(A)
    monkeypatch.setattr(_backend, "library_name", lambda x: "cupy")
    out = ih.as_cupyx(A)
    X = rows(3, 6).T
    for product in (out.matmat, out.rmatmat):
        np.testing.assert_allclose(product(X), M @ X)
    for product in (out.matvec, out.rmatvec):
        np.testing.assert_allclose(product(X[:, 0]), M @ X[:, 0])
    assert (out.shape, out.dtype) == ((6, 6), np.float64)


@pytest.mark.cupy
def test_cupyx_takes_these_arguments():
    """Read from its source: the module itself loads CUDA libraries at import."""
    cupy = installed("cupy")
    source = Path(cupy.__file__).parents[1] / "cupyx/scipy/sparse/linalg/_interface.py"
    classes = {
        node.name: node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    init = next(
        node
        for node in classes["_CustomLinearOperator"].body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    taken = [argument.arg for argument in init.args.args[1:]]
    assert set(taken) >= {item.name for item in dataclasses.fields(FakeOperator)}


class FakeCuda:
    """The part of `cupy.cuda` and `torch.cuda` that the shared pool uses, with a ledger."""

    def __init__(self, available: bool = True) -> None:
        self.available = available
        self.held: dict[int, tuple[int, int, int]] = {}
        self.allocator: Any = None
        self.freed_blocks = 0

    def is_available(self) -> bool:
        return self.available

    def init(self) -> None: ...

    def get_current_stream(self, device: int) -> Any:
        return types.SimpleNamespace(ptr=7000 + device)

    def caching_allocator_alloc(self, size: int, device: int, stream: int) -> int:
        pointer = 1 + len(self.held)
        self.held[pointer] = size, device, stream
        return pointer

    def caching_allocator_delete(self, pointer: int) -> None:
        del self.held[pointer]

    def PythonFunctionAllocator(self, allocate: Any, free: Any) -> Any:
        return types.SimpleNamespace(malloc=allocate, free=free)

    def set_allocator(self, malloc: Any) -> None:
        self.allocator = malloc


def fake_gpu(monkeypatch: pytest.MonkeyPatch, *available: bool) -> tuple[FakeCuda, FakeCuda]:
    cupy, torch = (types.ModuleType(name) for name in ("cupy", "torch"))
    cuda = [FakeCuda(seen) for seen in available]
    cupy.cuda, torch.cuda = cuda  # pyright: ignore[reportAttributeAccessIssue]
    blocks = types.SimpleNamespace(
        free_all_blocks=lambda: setattr(cuda[0], "freed_blocks", cuda[0].freed_blocks + 1)
    )
    cupy.get_default_memory_pool = lambda: blocks  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "torch", torch)
    return cuda[0], cuda[1]


def test_share_memory_pool_asks_torch_for_memory(monkeypatch: pytest.MonkeyPatch):
    cupy, torch = fake_gpu(monkeypatch, True, True)
    ih.share_memory_pool()
    assert cupy.freed_blocks == 1
    pointer = cupy.allocator(512, 1)
    assert torch.held == {pointer: (512, 1, 7001)}  # on CuPy's stream of that device
    torch.caching_allocator_delete(pointer)
    assert torch.held == {}


def test_share_memory_pool_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    fake_gpu(monkeypatch, True, False)
    with pytest.raises(RuntimeError, match="CuPy sees one"):
        ih.share_memory_pool()
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match="cuda13"):
        ih.share_memory_pool()


@pytest.mark.gpu
def test_share_memory_pool_on_a_gpu():
    cupy, torch = installed("cupy"), installed("torch")
    if not (cupy.cuda.is_available() and torch.cuda.is_available()):
        pytest.skip("no CUDA device for CuPy and PyTorch")
    code = (
        "import cupy, torch, invhvp as ih; ih.share_memory_pool()\n"
        "x = cupy.ones(1 << 20, dtype=cupy.float32); torch.cuda.synchronize()\n"
        "held = torch.cuda.memory_allocated(); assert held >= 4 << 20, held\n"
        "assert float(x.sum()) == 1 << 20; del x\n"
        "assert torch.cuda.memory_allocated() < 4 << 20; print('shared')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.strip() == "shared", done.stderr


# ------------------------------------------------------------- `reduce=`: one vector, two devices


class FakeNccl:
    """Stands for `cupyx.distributed.NCCLBackend`: `all_reduce(in_array, out_array, op)`.

    With CuPy the hook is `Reduced(cupyx.distributed.init_process_group(n_devices, rank))`.
    """

    def __init__(self, n_devices: int) -> None:
        self._barrier = threading.Barrier(n_devices, timeout=60)
        self._lock = threading.Lock()
        self._total: Any = None
        self.calls = 0

    def all_reduce(self, in_array: Any, out_array: Any, op: str = "sum") -> None:
        assert op == "sum"
        with self._lock:
            self._total = in_array.copy() if self._total is None else self._total + in_array
        self._barrier.wait()
        out_array[...] = self._total
        if self._barrier.wait() == 0:
            self._total, self.calls = None, self.calls + 1
        self._barrier.wait()


@dataclass
class Reduced:
    """What `reduce=` takes: a sum over the devices of a small array."""

    communicator: FakeNccl
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, x: Any, /) -> Any:
        self.seen.append(x.shape)
        total = np.empty_like(x)
        self.communicator.all_reduce(np.ascontiguousarray(x), total, op="sum")
        return total


@pytest.mark.parametrize("kind", [ih.CG, ih.BlockCG], ids=lambda kind: kind.__name__)
def test_a_sharded_parameter_vector_is_solved_like_a_whole_one(kind: Any):
    """Two devices hold 30 and 50 of 80 parameters of diag(d) + U Uᵀ, and rows of U."""
    U, d = rows(4, 80).T / 4, np.geomspace(1.0, 1e-2, 80)
    B = np.random.default_rng(1).standard_normal((80, 3))
    exact = np.linalg.solve(np.diag(d + 1e-2) + U @ U.T, B)
    whole = ih.solve(
        ih.Callback(lambda X: d[:, None] * X + U @ (U.T @ X), 80, like=B, psd=True),
        B, kind(rtol=1e-10), damping=1e-2,
    )  # fmt: skip
    shards = [slice(0, 30), slice(30, 80)]
    nccl, found, errors = FakeNccl(2), {}, []

    def device(rank: int) -> None:
        mine, reduce = shards[rank], Reduced(nccl)

        def product(X: np.ndarray) -> np.ndarray:
            return d[mine, None] * X + U[mine] @ reduce(U[mine].T @ X)

        try:
            A = ih.Callback(product, U[mine].shape[0], like=B, psd=True)
            method = kind(rtol=1e-10, reduce=reduce, maxiter=800)
            found[rank] = ih.solve(A, B[mine], method, damping=1e-2), reduce.seen
        except BaseException as error:
            nccl._barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=device, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    together = np.concatenate([found[rank][0].x for rank in range(2)])
    scale = np.max(np.abs(exact))
    np.testing.assert_allclose(together, exact, rtol=0, atol=1e-8 * scale)
    for rank in range(2):
        solution, shapes = found[rank]
        assert solution.status == whole.status == (ih.Status.CONVERGED,) * 3
        np.testing.assert_allclose(
            solution.residual_norms, found[0][0].residual_norms, rtol=1e-12
        )  # of the whole vector, on every device
        assert max(np.prod(shape) for shape in shapes) <= 16  # nothing of length n crosses over
    assert nccl.calls > 0


# --------------------------------------------- what SciPy promises of its solvers, asked of ours


@dataclass
class Given:
    """SciPy's `M`, an approximate inverse, as a prepared inverse."""

    map: Any
    fixed_spd: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.map.shape


def solver(kind: Any) -> Callable[..., tuple[np.ndarray, int]]:
    """A method with the signature and the return values of SciPy's iterative solvers."""

    def solve(
        A: Any, b: Any, x0: Any = None, *, rtol: float = 1e-5, atol: float = 0.0,
        maxiter: int | None = None, M: Any = None, callback: Any = None,
    ) -> tuple[np.ndarray, int]:  # fmt: skip
        options: dict[str, Any] = {"rtol": rtol, "atol": atol, "maxiter": maxiter}
        if M is not None:
            options["preconditioner"] = ih.Fixed(Given(ih.as_operator(M)))
        inverse = kind(**options).prepare(ih.as_operator(A), damping=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ih.ConvergenceWarning)
            solution = inverse.solve(b, x0=x0, callback=callback)
        if solution.status in (ih.Status.CONVERGED, ih.Status.ZERO):
            return solution.x, 0
        if solution.status is ih.Status.MAXITER:
            return solution.x, solution.iterations
        return solution.x, -1  # illegal input or breakdown

    return solve


KINDS = {"CG": ih.CG, "BlockCG": ih.BlockCG, "Minres": ih.Minres}
DEFINITE = ["CG", "BlockCG"]


def poisson(n: int = 40) -> sp.csr_array:
    return sp.csr_array(sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n)))


def poisson_2d(n: int = 7) -> sp.csr_array:
    return sp.csr_array(sp.kronsum(poisson(n), poisson(n)))


SYSTEMS: dict[str, Callable[[], Any]] = {
    "poisson-1d": poisson,
    "poisson-2d": poisson_2d,
    "random-spd": lambda: matrix(*np.random.default_rng(5).uniform(0.1, 3.0, 25)),
    "diagonal": lambda: sp.csr_array(sp.diags_array(np.linspace(1.0, 10.0, 30))),
    "one-by-one": lambda: np.array([[3.0]]),
    "clustered": lambda: matrix(*([1.0] * 15 + [50.0] * 5)),
}


def right_hand_side(A: Any) -> np.ndarray:
    return np.random.default_rng(A.shape[0]).standard_normal(A.shape[0])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("rtol", [1e-3, 1e-9])
def test_converges_to_the_tolerance_asked(name: str, system: str, rtol: float):
    A = SYSTEMS[system]()
    b = right_hand_side(A)
    x, info = solver(KINDS[name])(A, b, rtol=rtol)
    assert info == 0
    assert np.linalg.norm(b - A @ x) <= rtol * np.linalg.norm(b)


@pytest.mark.parametrize("name", KINDS)
def test_absolute_tolerance_is_the_larger_of_the_two(name: str):
    A, b = poisson(), 1e3 * right_hand_side(poisson())
    x, info = solver(KINDS[name])(A, b, rtol=0.0, atol=1e-2)
    assert info == 0
    assert np.linalg.norm(b - A @ x) <= 1e-2
    x, info = solver(KINDS[name])(A, b, rtol=1e-14, atol=np.linalg.norm(b))
    assert info == 0
    np.testing.assert_array_equal(x, np.zeros_like(b))  # zero is good enough: nothing to do


@pytest.mark.parametrize("name", KINDS)
def test_limit_of_iterations(name: str):
    A, b = poisson_2d(), right_hand_side(poisson_2d())
    x, info = solver(KINDS[name])(A, b, rtol=1e-12, maxiter=3)
    assert info == 3
    assert np.linalg.norm(b - A @ x) > 1e-12 * np.linalg.norm(b)
    assert solver(KINDS[name])(A, b, rtol=1e-12)[1] == 0


@pytest.mark.parametrize("name", KINDS)
def test_start_that_solves_already(name: str):
    A = poisson()
    exact = np.linspace(0.0, 1.0, 40)
    start = exact.copy()
    calls: list[Any] = []
    x, info = solver(KINDS[name])(A, A @ exact, x0=start, callback=calls.append)
    assert info == 0
    assert not calls
    np.testing.assert_array_equal(x, exact)
    np.testing.assert_array_equal(start, exact)  # and is not written to


@pytest.mark.parametrize("name", KINDS)
def test_start_nearby_saves_iterations(name: str):
    A, b = poisson_2d(), right_hand_side(poisson_2d())
    exact = ssl.spsolve(sp.csc_array(A), b)
    far: list[Any] = []
    near: list[Any] = []
    solver(KINDS[name])(A, b, rtol=1e-6, callback=far.append)
    x, info = solver(KINDS[name])(
        A, b, x0=exact + 1e-4 * np.sin(np.arange(exact.size)), rtol=1e-6, callback=near.append
    )
    assert info == 0
    assert len(near) < len(far)
    assert np.linalg.norm(b - A @ x) <= 1e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("name", KINDS)
def test_zero_right_hand_side(name: str):
    x, info = solver(KINDS[name])(poisson(), np.zeros(40))
    assert info == 0
    np.testing.assert_array_equal(x, np.zeros(40))


@pytest.mark.parametrize("name", KINDS)
def test_scale_of_the_right_hand_side_changes_nothing_but_the_scale(name: str):
    A, b = poisson(), right_hand_side(poisson())
    x, _ = solver(KINDS[name])(A, b, rtol=1e-8)
    for scale in (1e-150, 1e150):
        scaled, info = solver(KINDS[name])(A, scale * b, rtol=1e-8)
        assert info == 0
        np.testing.assert_allclose(scaled / scale, x, rtol=1e-6)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "wrap", [sp.csr_array, ssl.aslinearoperator, np.asarray], ids=["csr", "operator", "array"]
)
def test_dtype_and_shape_are_kept(name: str, dtype: str, wrap: Any):
    dense = poisson().toarray().astype(dtype)
    b = right_hand_side(dense).astype(dtype)
    x, info = solver(KINDS[name])(wrap(dense), b, rtol=1e-4)
    assert info == 0
    assert (x.dtype, x.shape) == (np.dtype(dtype), (40,))
    X, info = solver_of_blocks(KINDS[name], wrap(dense), np.stack([b, 2 * b], axis=1))
    assert X.shape == (40, 2)


def solver_of_blocks(kind: Any, A: Any, B: np.ndarray) -> tuple[np.ndarray, Any]:
    solution = kind(rtol=1e-4).prepare(ih.as_operator(A), damping=0.0).solve(B)
    return solution.x, solution.status


@pytest.mark.parametrize("name", DEFINITE)
def test_preconditioner_saves_iterations_and_keeps_the_tolerance(name: str):
    spread = np.geomspace(1.0, 1e4, 40)
    A = sp.csr_array(sp.diags_array(spread) + 0.1 * poisson())
    b = right_hand_side(A)
    plain: list[Any] = []
    helped: list[Any] = []
    solver(KINDS[name])(A, b, rtol=1e-8, callback=plain.append)
    M = ssl.LinearOperator(A.shape, matvec=lambda r: r.ravel() / spread, dtype=float)
    x, info = solver(KINDS[name])(A, b, rtol=1e-8, M=M, callback=helped.append)
    assert info == 0
    assert len(helped) < len(plain) / 2
    assert np.linalg.norm(b - A @ x) <= 1e-8 * np.linalg.norm(b)


@pytest.mark.parametrize("name", DEFINITE)
def test_exact_preconditioner_needs_one_or_two_iterations(name: str):
    A = poisson_2d()
    lu = ssl.splu(sp.csc_array(A))
    M = ssl.LinearOperator(A.shape, matvec=lu.solve, matmat=lu.solve, dtype=float)
    calls: list[Any] = []
    _, info = solver(KINDS[name])(A, right_hand_side(A), rtol=1e-10, M=M, callback=calls.append)
    assert info == 0
    assert len(calls) <= 2


@pytest.mark.parametrize("name", KINDS)
def test_callback_sees_every_iteration(name: str):
    A, b = poisson_2d(), right_hand_side(poisson_2d())
    seen: list[ih.Solution] = []
    solver(KINDS[name])(A, b, rtol=1e-8, callback=seen.append)
    assert [record.iteration for record in seen] == list(range(1, len(seen) + 1))
    last = float(seen[-1].relative_residuals[0])
    assert last <= 1e-8 < float(seen[0].relative_residuals[0])


@pytest.mark.parametrize("name", DEFINITE)
def test_negative_definite_breaks_down_by_name(name: str):
    _, info = solver(KINDS[name])(-1.0 * poisson(), right_hand_side(poisson()))
    assert info == -1
    with pytest.raises(ih.IndefiniteError):
        KINDS[name]().prepare(ih.as_operator(-1.0 * poisson()), damping=0.0) @ np.ones(40)


def test_minres_solves_what_is_indefinite():
    A = matrix(*np.concatenate([np.linspace(-3.0, -1.0, 5), np.linspace(1.0, 2.0, 10)]))
    b = right_hand_side(A)
    x, info = solver(ih.Minres)(A, b, rtol=1e-9)
    assert info == 0
    assert np.linalg.norm(b - A @ x) <= 1e-9 * np.linalg.norm(b)


@pytest.mark.parametrize("name", KINDS)
def test_singular_and_inconsistent_is_not_called_solved(name: str):
    A = np.diag([1.0, 2.0, 0.0])
    _, info = solver(KINDS[name])(A, np.ones(3), rtol=1e-8)
    assert info != 0


@pytest.mark.parametrize("name", DEFINITE)
def test_singular_and_consistent_is_solved(name: str):
    A = np.diag([1.0, 2.0, 3.0, 0.0])
    x, info = solver(KINDS[name])(A, np.array([1.0, 1.0, 1.0, 0.0]), rtol=1e-8)
    assert info == 0
    np.testing.assert_allclose(x[:3], [1.0, 0.5, 1 / 3], rtol=1e-7)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_right_hand_side_that_is_not_finite(name: str, bad: float):
    b = np.ones(40)
    b[3] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        solver(KINDS[name])(poisson(), b)


@pytest.mark.parametrize("name", KINDS)
def test_shapes_that_do_not_fit(name: str):
    with pytest.raises(ValueError, match="square"):
        solver(KINDS[name])(sp.csr_array(np.ones((3, 4))), np.ones(3))
    with pytest.raises(ValueError, match="arrays of shape"):
        solver(KINDS[name])(poisson(), np.ones(41))
    with pytest.raises(ValueError, match="x0"):
        solver(KINDS[name])(poisson(), np.ones(40), x0=np.ones(41))


@pytest.mark.parametrize("name", DEFINITE)
def test_agrees_with_scipy_to_the_tolerance(name: str):
    A, b = poisson_2d(), right_hand_side(poisson_2d())
    ours, _ = solver(KINDS[name])(A, b, rtol=1e-10)
    theirs, _ = ssl.cg(A, b, rtol=1e-10)
    bound = 2e-10 * np.linalg.norm(b) / np.linalg.eigvalsh(A.toarray())[0]
    assert np.linalg.norm(ours - theirs) <= bound
