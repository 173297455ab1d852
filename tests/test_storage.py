"""Inverses on disk: what comes back is what was saved, on any library, or it is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import invhvp as ih
from invhvp.gradients import GradientMatrix
from invhvp.operators import CurvatureBlocks, LinearOperator
from invhvp.protocols import Array
from tests.backends import Backend
from tests.cases import LAYOUT, OPERATORS, N, matrix, rows

pytest.importorskip("safetensors", reason="saved state needs safetensors")

DAMPING, OTHER = 0.3, 0.7
BY_BLOCK = {"weight": 0.25, "bias": 0.5}
Make = Callable[[Backend], Any]


def _of(operator: str, method: Any, damping: Any = DAMPING) -> Make:
    return lambda b: method.prepare(OPERATORS[operator](b)[0], damping=damping)


def _stacked(b: Backend, n_samples: int = 5) -> GradientMatrix:
    rng = np.random.default_rng(4)
    d, a = rng.standard_normal((n_samples, 3, 2)), rng.standard_normal((n_samples, 3, 4))
    weight = ih.OuterProductGradients(output_grads=b.asarray(d), inputs=b.asarray(a))
    bias = ih.DenseGradients(b.asarray(rng.standard_normal((n_samples, 4))))
    return ih.StackedGradients({"weight": weight, "bias": bias}, layout=LAYOUT)


def _embedding(b: Backend) -> GradientMatrix:
    rng = np.random.default_rng(5)
    table = ih.EmbeddingGradients(
        output_grads=b.asarray(rng.standard_normal((4, 3, 2))),
        indices=b.integers([[0, 3, 0], [1, 1, 1], [2, 0, 3], [3, 2, 1]]),
        n_rows=4,
    )
    return ih.StackedGradients({"weight": table, "bias": _stacked(b, 4).blocks["bias"]})


def _on(gradients: Callable[[Backend], GradientMatrix], method: Any, damping: Any = DAMPING):
    return lambda b: method.prepare(ih.RankOneMean(gradients(b)), damping=damping)


def _kronecker(b: Backend) -> LinearOperator:
    S, A = matrix(2.0, 0.3, seed=1), matrix(1.0, 0.5, 0.2, 0.1, seed=2)
    return ih.Kronecker(b.asarray(S), b.asarray(A), 1.5)


def _kfac(b: Backend) -> LinearOperator:
    bias = ih.EigenKronecker(
        b.asarray(np.linalg.qr(rows(4, 4))[0]), None, b.asarray([[2.0], [1.0], [0.2], [0.0]])
    )
    return ih.BlockDiagonal({"weight": _kronecker(b), "bias": bias}, LAYOUT)


def _curvature_blocks(b: Backend) -> LinearOperator:
    """As an adapter makes it: a block holds several parameters, which λ may be given for."""
    blocks = {"layer": _kronecker(b), "norm": ih.Diagonal(b.asarray([2.0, 1.0, 0.5, 0.1]))}
    inside = {"layer": ("weight", "bias"), "norm": ("scale",)}
    traces = {"layer": 9.0, "norm": 3.6}
    return CurvatureBlocks(blocks, name="EKFAC", parameters=inside, traces=traces)


def _mixed(b: Backend) -> LinearOperator:
    """A block that is a function: its factor can be stored, it cannot."""
    M = b.asarray(matrix(1.0, 0.5, 0.3, 0.1))
    bias = ih.Callback(lambda X: M @ X, 4, like=M, psd=True)
    return ih.BlockDiagonal({"weight": _kronecker(b), "bias": bias}, LAYOUT)


# Every inverse that can be saved, and whether its operator comes back with it.
INVERSES: dict[str, tuple[Make, bool]] = {
    "direct-dense": (_of("dense", ih.Direct()), True),
    "direct-indefinite": (_of("dense-indefinite", ih.Direct(), 0.1), True),
    "direct-callback": (_of("callback", ih.Direct()), False),
    "direct-by-block": (_of("dense", ih.Direct(), BY_BLOCK), True),
    "direct-diagonal": (_of("diagonal", ih.Direct(), 2.0), True),
    "direct-identity": (_of("identity", ih.Direct()), True),
    "direct-block-diagonal": (_of("block-diagonal-permuted", ih.Direct()), True),
    "direct-low-rank": (_of("low-rank", ih.Direct()), True),
    "direct-low-rank-by-block": (_of("low-rank", ih.Direct(), BY_BLOCK), True),
    "direct-wide": (_of("rank-one-mean-wide", ih.Direct()), True),
    "direct-pseudo": (_of("rank-one-mean-wide", ih.Direct(singular="truncate"), 0.0), True),
    "direct-kronecker": (lambda b: ih.Direct().prepare(_kronecker(b), damping=DAMPING), True),
    "direct-kfac": (lambda b: ih.Direct().prepare(_kfac(b), damping=BY_BLOCK), True),
    "direct-curvature-blocks": (
        lambda b: ih.Direct().prepare(
            _curvature_blocks(b), damping={"weight": 0.2, "bias": 0.2, "scale": 0.4}
        ),
        True,
    ),
    "direct-mixed": (lambda b: ih.Direct().prepare(_mixed(b), damping=DAMPING), False),
    "sample-space": (_of("rank-one-mean-counted", ih.SampleSpace()), True),
    "sample-space-tall": (_of("rank-one-mean-tall", ih.SampleSpace()), False),
    "sample-space-stacked": (_on(_stacked, ih.SampleSpace()), True),
    "sample-space-embedding": (_on(_embedding, ih.SampleSpace()), True),
    "sample-space-by-block": (_on(_stacked, ih.SampleSpace(), BY_BLOCK), True),
    "harmonic-mean": (_on(_stacked, ih.InverseHarmonicMean()), True),
    "harmonic-mean-layer": (_on(_stacked, ih.InverseHarmonicMean(block="layer")), True),
    "harmonic-mean-by-block": (_on(_stacked, ih.InverseHarmonicMean(), BY_BLOCK), True),
    "jacobi": (_of("callback", ih.Jacobi(samples=5)), False),
    "jacobi-exact": (_of("dense", ih.Jacobi(), BY_BLOCK), False),
    "arnoldi": (_of("callback", ih.Arnoldi(rank=3)), False),
    "arnoldi-indefinite": (_of("dense-indefinite", ih.Arnoldi(rank=2), 0.6), False),
    "arnoldi-by-block": (_of("dense", ih.Arnoldi(rank=3), BY_BLOCK), False),
    "arnoldi-drop": (_of("callback", ih.Arnoldi(rank=2, complement="drop")), False),
    "nystroem-sketch": (_of("callback", ih.NystroemSketch(rank=4)), False),
    "nystroem-signed": (_of("dense-indefinite", ih.NystroemSketch(rank=6), 0.6), False),
    "nystroem-preconditioner": (_of("callback", ih.NystroemPreconditioner(rank=4)), False),
    "blockwise": (_of("block-diagonal", ih.Blockwise(ih.Direct())), True),
    "blockwise-arnoldi": (_of("block-diagonal", ih.Blockwise(ih.Arnoldi(rank=2)), 0.5), False),
}
# Another λ takes products with what was not stored.
NOT_FREE = {"sample-space-tall", "direct-mixed"}


def dense(A: LinearOperator, b: Backend) -> np.ndarray:
    return b.to_numpy(A @ b.asarray(np.eye(A.shape[0])))


def numpy_twin(b: Backend) -> Backend:
    """NumPy in the dtype of another backend."""
    return Backend(name="numpy", np_dtype=b.np_dtype, place=lambda a: a)


def close(found: np.ndarray, expected: np.ndarray, b: Backend, units: float = 50.0) -> None:
    scale = float(np.max(np.abs(expected)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=units * b.eps * scale)


@pytest.mark.backends("numpy-f32", "strict", "torch-cpu-f32", "cupy", "torch-cuda")
@pytest.mark.parametrize("name", INVERSES)
def test_comes_back_as_it_was(name: str, backend: Backend, tmp_path: Path):
    make, keeps_operator = INVERSES[name]
    inverse = make(backend)
    ih.save(inverse, tmp_path / "state")
    again = ih.load(tmp_path / "state", like=backend.asarray([]))
    assert type(again) is type(inverse)
    assert again.method == inverse.method
    assert again.damping == inverse.damping
    assert again.products == inverse.products
    assert again.fixed_spd == inverse.fixed_spd
    assert again.shape == inverse.shape
    backend.assert_like(again @ backend.asarray(np.ones(again.shape[0])))
    close(dense(again, backend), dense(inverse, backend), backend, 10)

    B = backend.asarray(rows(2, again.shape[0]).T)
    if not keeps_operator:
        with pytest.raises(ValueError, match=r"operator= to ih\.load"):
            again.solve(B)
        again = ih.load(tmp_path / "state", operator=inverse.operator)
    found, expected = again.solve(B), inverse.solve(B)
    assert found.status == expected.status
    close(backend.to_numpy(found.x), backend.to_numpy(expected.x), backend)
    residual = B - (inverse.operator @ found.x + _shifted(inverse, found.x))
    norms = np.linalg.norm(backend.to_numpy(residual), axis=0)
    np.testing.assert_allclose(
        backend.to_numpy(found.residual_norms), norms, rtol=0.2, atol=500 * backend.eps
    )


def _shifted(inverse: Any, X: Array) -> Array:
    shift = inverse.shift
    return shift * X if isinstance(shift, float) else shift[:, None] * X


@pytest.mark.backends("numpy-f64", "strict-no_float64", "cupy-f32")
@pytest.mark.parametrize("name", [name for name in INVERSES if name not in NOT_FREE])
def test_another_damping_costs_no_product(name: str, backend: Backend, tmp_path: Path):
    inverse = INVERSES[name][0](backend)
    ih.save(inverse, tmp_path / "state")
    damping = 2.5 if name == "direct-diagonal" else OTHER
    again = ih.load(tmp_path / "state", like=backend.asarray([])).with_damping(damping)
    close(dense(again, backend), dense(inverse.with_damping(damping), backend), backend, 100)


@pytest.mark.parametrize("name", sorted(NOT_FREE))
def test_another_damping_that_is_not_free_says_what_it_needs(name: str, tmp_path: Path):
    backend = numpy_twin(Backend(name="", np_dtype=np.dtype(float), place=lambda a: a))
    inverse = INVERSES[name][0](backend)
    ih.save(inverse, tmp_path / "state")
    with pytest.raises((ValueError, TypeError), match=r"operator= to ih\.load|has none"):
        ih.load(tmp_path / "state").with_damping(OTHER)
    again = ih.load(tmp_path / "state", operator=inverse.operator).with_damping(OTHER)
    close(dense(again, backend), dense(inverse.with_damping(OTHER), backend), backend)


@pytest.mark.backends("strict-device1", "torch-cpu-f64", "cupy", "torch-cuda")
@pytest.mark.parametrize("name", INVERSES)
def test_changes_library(name: str, backend: Backend, tmp_path: Path):
    twin = numpy_twin(backend)
    inverse = INVERSES[name][0](backend)
    ih.save(inverse, tmp_path / "out")
    on_host = ih.load(tmp_path / "out")  # NumPy is what is loaded by default
    assert isinstance(on_host.like, np.ndarray)
    assert on_host.dtype == backend.np_dtype
    close(dense(on_host, twin), dense(inverse, backend), backend, 1e3)

    ih.save(on_host, tmp_path / "back")
    back = ih.load(tmp_path / "back", like=backend.asarray([]))
    backend.assert_like(back @ backend.asarray(np.ones(back.shape[0])))
    close(dense(back, backend), dense(inverse, backend), backend, 1e3)


def test_an_operator_of_another_library_is_recognised(backend: Backend, tmp_path: Path):
    inverse = INVERSES["arnoldi"][0](numpy_twin(backend))
    ih.save(inverse, tmp_path / "state")
    A, M = OPERATORS["callback"](backend)
    again = ih.load(tmp_path / "state", operator=A)
    solution = again.solve(backend.asarray(np.ones(N)))
    x = backend.to_numpy(solution.x)
    residual = np.ones(N) - (M + DAMPING * np.eye(N)) @ x
    found = float(backend.to_numpy(solution.residual_norms))
    assert found == pytest.approx(np.linalg.norm(residual), rel=1e-4)


def test_is_a_preconditioner_again(tmp_path: Path):
    A = ih.Diagonal(1.0 / np.arange(1.0, 201.0) ** 2, psd=True)
    inverse = ih.NystroemPreconditioner(rank=60).prepare(A, damping=1e-5)
    ih.save(inverse, tmp_path / "state")
    loaded = ih.load(tmp_path / "state")
    plain = ih.solve(A, np.ones(200), ih.BlockCG(), damping=1e-5)
    helped = ih.solve(A, np.ones(200), ih.BlockCG(preconditioner=ih.Fixed(loaded)), damping=1e-5)
    assert helped.status is ih.Status.CONVERGED
    assert helped.passes < plain.passes / 4


@pytest.mark.backends("torch-cpu-f64")
def test_curvature_of_a_torch_model(backend: Backend, tmp_path: Path):
    import torch

    it = pytest.importorskip("invhvp_torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    model = model.double()
    data = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 3
    loss = torch.nn.functional.cross_entropy
    B = torch.randn(sum(p.numel() for p in model.parameters()), 2, dtype=torch.float64)
    belongs = {"model": model.state_dict(), "data": data}
    for make in (it.ekfac, it.kfac, it.gauss_newton):
        A = make(model, loss, data)
        inverse = ih.Direct().prepare(A, damping=1e-2)
        ih.save(inverse, tmp_path / "state", fingerprint=belongs)
        on_host = ih.load(tmp_path / "state", fingerprint=belongs)  # without torch or the model
        solution = on_host.solve(B.numpy())
        assert solution.status == (ih.Status.CONVERGED,) * 2
        exact = torch.linalg.solve(A.to_dense() + 1e-2 * torch.eye(B.shape[0]).double(), B)
        np.testing.assert_allclose(
            solution.x, exact.numpy(), rtol=0, atol=1e-10 * exact.abs().max()
        )
    with torch.no_grad():
        model[0].weight[0, 0] += 1.0
    with pytest.raises(ih.StateError, match=r"\['model'\]\['0\.weight'\]"):
        ih.load(tmp_path / "state", fingerprint={"model": model.state_dict(), "data": data})


def test_a_foreign_subclass_is_not_taken_for_its_base(tmp_path: Path):
    class Negative(ih.Diagonal):
        def _matmat(self, X: Any, /) -> Any:
            return -super()._matmat(X)

    A = Negative(np.arange(1.0, 4.0))
    inverse = ih.Direct().prepare(A, damping=1.0)
    ih.save(inverse, tmp_path / "state")
    with pytest.raises(ValueError, match="without its operator"):
        ih.load(tmp_path / "state").solve(np.ones(3))


def test_scores_come_from_gram_matrices_after_loading(tmp_path: Path):
    backend = numpy_twin(Backend(name="", np_dtype=np.dtype(float), place=lambda a: a))
    train = _stacked(backend, 5)
    inverse = ih.SampleSpace().prepare(ih.RankOneMean(train), damping=DAMPING)
    ih.save(inverse, tmp_path / "state")
    again = ih.load(tmp_path / "state")
    scores = ih.Influence(again, train).scores(train[:2])
    np.testing.assert_allclose(scores, ih.Influence(inverse, train).scores(train[:2]), rtol=1e-12)


# --------------------------------------------------------------------------- what is in the file


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    backend = numpy_twin(Backend(name="", np_dtype=np.dtype(float), place=lambda a: a))
    folder = tmp_path / "state"
    ih.save(INVERSES["nystroem-signed"][0](backend), folder, fingerprint={"epoch": 3})
    return folder


def test_two_plain_files(saved: Path):
    from safetensors.numpy import load_file

    assert sorted(p.name for p in saved.iterdir()) == ["state.json", "state.safetensors"]
    assert [p.name for p in saved.parent.iterdir()] == ["state"]  # nothing temporary is left
    content = json.loads((saved / "state.json").read_text())
    assert content["class"] == "SpectralInverse"
    assert content["version"] == ih.__version__
    assert content["inverse"]["method"] == ih.method_to_dict(ih.NystroemSketch(rank=6))
    assert content["inverse"]["damping"] == 0.6
    tensors = load_file(saved / "state.safetensors")
    assert content["tensors"]["bytes"] == (saved / "state.safetensors").stat().st_size
    assert tensors
    assert all(a.dtype.kind in "fib" for a in tensors.values())


def test_shared_arrays_are_stored_once(tmp_path: Path):
    backend = numpy_twin(Backend(name="", np_dtype=np.dtype(float), place=lambda a: a))
    inverse = ih.Direct().prepare(_kfac(backend), damping=DAMPING)
    ih.save(inverse, tmp_path / "state")
    # Two factors, their eigenvectors and eigenvalues twice (of A and of its inverse), no more.
    numbers = 2 * (2 * 2 + 4 * 4) + 2 * 8 + 4 * 4 + 2 * 4
    assert (tmp_path / "state" / "state.safetensors").stat().st_size < 8 * numbers + 2_000


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_tensors_are_refused(saved: Path, keep: float):
    file = saved / "state.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ih.StateError, match="truncated"):
        ih.load(saved)


@pytest.mark.parametrize("where", [0, 9, 0.3, 0.6, -1])
def test_one_changed_bit_is_refused(saved: Path, where: float):
    file = saved / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[int(where * len(data)) if isinstance(where, float) else where] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ih.StateError, match="changed"):
        ih.load(saved)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"damping": 0.6', '"damping": 0.5', "changed"),
        ('"epoch": 3', '"epoch": 4', "changed"),
        ("invhvp-state/1", "invhvp-state/9", "invhvp-state/9"),
        ("}\n", "", "damaged"),
        ("{", "", "damaged"),
    ],
)
def test_a_changed_description_is_refused(saved: Path, old: str, new: str, said: str):
    file = saved / "state.json"
    text = file.read_text()
    assert old in text
    head, _, tail = text.rpartition(old)
    file.write_text(head + new + tail)
    with pytest.raises(ih.StateError, match=said):
        ih.load(saved)


def test_what_is_missing_is_said(saved: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"state\.json is missing"):
        ih.load(tmp_path / "nothing")
    (saved / "state.safetensors").unlink()
    with pytest.raises(ih.StateError, match="incomplete"):
        ih.load(saved)


def test_state_of_another_version_is_refused_by_name(saved: Path):
    from invhvp.storage import _files

    content = json.loads((saved / "state.json").read_text())
    del content["checksum"], content["inverse"]["products"]
    content["version"] = "9.9"
    content["checksum"] = _files._checksum(content)
    (saved / "state.json").write_text(json.dumps(content))
    with pytest.raises(ih.StateError, match=r"written by invhvp 9\.9.*products"):
        ih.load(saved)


# ------------------------------------------------------------------------------------- atomicity


def test_replaces_as_a_whole(saved: Path):
    ih.save(ih.Direct().prepare(ih.Diagonal(np.ones(3)), damping=1.0), saved)
    np.testing.assert_array_equal(ih.load(saved) @ np.ones(3), np.full(3, 0.5))
    assert [p.name for p in saved.parent.iterdir()] == ["state"]


@pytest.mark.parametrize("fails", ["save_file", "fsync", "rename"])
def test_a_save_that_fails_leaves_what_was_there(
    saved: Path, fails: str, monkeypatch: pytest.MonkeyPatch
):
    import safetensors.numpy

    before = ih.load(saved) @ np.ones(N)

    def failing(*args: Any, **options: Any) -> Any:
        raise OSError("no space left")

    if fails == "save_file":
        monkeypatch.setattr(safetensors.numpy, "save_file", failing)
    elif fails == "fsync":
        monkeypatch.setattr(os, "fsync", failing)
    else:
        rename = Path.rename

        def second(self: Path, target: Any) -> Any:
            return failing() if Path(target) == saved and "prev" not in self.name else rename(
                self, target
            )  # fmt: skip

        monkeypatch.setattr(Path, "rename", second)
    with pytest.raises(OSError, match="no space"):
        ih.save(ih.Direct().prepare(ih.Diagonal(np.ones(3)), damping=1.0), saved)
    monkeypatch.undo()
    assert [p.name for p in saved.parent.iterdir()] == ["state"]
    np.testing.assert_array_equal(ih.load(saved) @ np.ones(N), before)


def test_both_files_reach_the_disk_before_the_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def flushed(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(self: Path, target: Any) -> Any:
        events.append(f"-> {Path(target).name}")
        return rename(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("handles have names in /proc only on Linux")
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    ih.save(ih.Direct().prepare(ih.Diagonal(np.ones(3)), damping=1.0), tmp_path / "state")
    at = events.index("-> state")
    assert {"state.json", "state.safetensors"} <= set(events[:at])
    assert events[at + 1 :] == [tmp_path.name]


def test_an_interrupted_replacement_is_named(saved: Path):
    saved.rename(saved.with_name(".state.previous"))  # where a crash between two renames leaves it
    with pytest.raises(FileNotFoundError, match=r"interrupted.*\.state\.previous"):
        ih.load(saved)


def test_refuses_to_replace_other_things(tmp_path: Path):
    inverse = ih.Direct().prepare(ih.Diagonal(np.ones(3)), damping=1.0)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("all of it")
    (tmp_path / "file").write_text("a file")
    for name in ("thesis", "file"):
        with pytest.raises(FileExistsError, match="another path"):
            ih.save(inverse, tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "all of it"


# ----------------------------------------------------------------------------------- fingerprints


def test_fingerprint_of_parameters_and_data(backend: Backend, tmp_path: Path):
    x, y = backend.asarray(rows(5)), backend.integers([0, 1, 2, 3, 4])

    def belongs(scale: float = 1.0, epoch: int = 3, labels: Any = y) -> dict[str, Any]:
        return {"model": {"w": scale * x}, "data": (x, labels), "epoch": epoch}

    folder = tmp_path / "state"
    inverse = INVERSES["arnoldi"][0](backend)
    ih.save(inverse, folder, fingerprint=belongs())
    like = backend.asarray([])
    close(
        dense(ih.load(folder, like, fingerprint=belongs()), backend),
        dense(inverse, backend),
        backend,
    )
    with pytest.raises(ih.StateError, match=r"other parameters or data: fingerprint\['model'\]"):
        ih.load(folder, like, fingerprint=belongs(scale=1.5))
    with pytest.raises(ih.StateError, match=r"\['epoch'\] was 3, now 4"):
        ih.load(folder, like, fingerprint=belongs(epoch=4))
    with pytest.raises(ih.StateError, match=r"\['data'\]"):
        ih.load(folder, like, fingerprint=belongs(labels=backend.integers([0, 1, 2, 3, 3])))
    with pytest.raises(ih.StateError, match=r"\['epoch'\] is missing in the argument"):
        ih.load(folder, like, fingerprint={"model": {"w": x}, "data": (x, y)})


def test_fingerprint_is_of_values_not_of_the_library(backend: Backend, tmp_path: Path):
    twin = numpy_twin(backend)
    ih.save(INVERSES["arnoldi"][0](twin), tmp_path / "state", fingerprint=twin.asarray(rows(4)))
    ih.load(tmp_path / "state", fingerprint=backend.asarray(rows(4)))
    changed = rows(4)
    changed[-1, -1] += 1e-3
    with pytest.raises(ih.StateError, match="other parameters"):
        ih.load(tmp_path / "state", fingerprint=backend.asarray(changed))


def test_fingerprint_of_gradients_and_of_streams(tmp_path: Path):
    G = rows(6)
    inverse = ih.SampleSpace().prepare(ih.RankOneMean(ih.DenseGradients(G)), damping=DAMPING)
    for make in (ih.DenseGradients, lambda g: ih.StreamedGradients([g[:4], g[4:]])):
        ih.save(inverse, tmp_path / "state", fingerprint=make(G))
        ih.load(tmp_path / "state", fingerprint=make(G))
        with pytest.raises(ih.StateError, match="other parameters"):
            ih.load(tmp_path / "state", fingerprint=make(G[::-1]))


def test_fingerprint_where_none_was_given(tmp_path: Path):
    ih.save(ih.Direct().prepare(ih.Diagonal(np.ones(3)), damping=1.0), tmp_path / "state")
    with pytest.raises(ih.StateError, match="without a fingerprint"):
        ih.load(tmp_path / "state", fingerprint="mine")
    with pytest.raises(TypeError, match="state_dict"):
        ih.load(tmp_path / "state", fingerprint=object())


def test_another_operator_is_refused(backend: Backend, tmp_path: Path):
    A, _ = OPERATORS["callback"](backend)
    ih.save(ih.Arnoldi(rank=3).prepare(A, damping=DAMPING), tmp_path / "state")
    ih.load(tmp_path / "state", operator=A)
    retrained = ih.Callback(lambda X: 1.05 * (A @ X), N, like=A.like, psd=True)
    with pytest.raises(ih.StateError, match=r"not the one.*other parameters"):
        ih.load(tmp_path / "state", operator=retrained)
    with pytest.raises(ih.StateError, match="psd = True, not False"):
        ih.load(tmp_path / "state", operator=OPERATORS["dense-indefinite"](backend)[0])
    with pytest.raises(ih.StateError, match="n = 12, not 3"):
        ih.load(tmp_path / "state", operator=ih.Diagonal(backend.asarray(np.ones(3))))


def test_an_operator_of_another_precision_is_refused(tmp_path: Path):
    A = ih.Diagonal(np.ones(3))
    ih.save(ih.Arnoldi(rank=2).prepare(A, damping=DAMPING), tmp_path / "state")
    with pytest.raises(ih.StateError, match="dtype = float64, not float32"):
        ih.load(tmp_path / "state", operator=ih.Diagonal(np.ones(3, np.float32)))


@pytest.mark.backends("strict-no_float64", "jax-f32")
def test_a_device_without_the_precision_is_refused(backend: Backend, tmp_path: Path):
    ih.save(ih.Arnoldi(rank=2).prepare(ih.Diagonal(np.ones(3)), damping=1.0), tmp_path / "state")
    with pytest.raises(ih.StateError, match="saved in float64"):
        ih.load(tmp_path / "state", like=backend.asarray([]))


# ------------------------------------------------------------------------------ what has no state


def test_streamed_gradients_stay_where_they_are(backend: Backend, tmp_path: Path):
    G = backend.asarray(rows(5))
    A = ih.RankOneMean(ih.StreamedGradients([G[:3, :], G[3:, :]]))
    for method in (ih.SampleSpace(), ih.InverseHarmonicMean()):
        inverse = method.prepare(A, damping=DAMPING)
        ih.save(inverse, tmp_path / "state")
        with pytest.raises(ih.StateError, match="pass operator="):
            ih.load(tmp_path / "state", like=G)
        again = ih.load(tmp_path / "state", operator=A)
        close(dense(again, backend), dense(inverse, backend), backend)
        assert (tmp_path / "state" / "state.safetensors").stat().st_size < 1_500


@pytest.mark.parametrize("method", [ih.CG(), ih.BlockCG(), ih.Minres()], ids=repr)
def test_what_iterates_anew_keeps_nothing(method: Any, tmp_path: Path):
    inverse = method.prepare(ih.Diagonal(np.ones(3)), damping=1.0)
    with pytest.raises(TypeError, match="method_to_dict"):
        ih.save(inverse, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_what_is_no_inverse_or_holds_another(tmp_path: Path):
    A = ih.Diagonal(np.ones(3))
    with pytest.raises(TypeError, match="prepared inverse, got Diagonal"):
        ih.save(A, tmp_path / "state")
    with pytest.raises(TypeError, match="store what it was made from"):
        ih.save(ih.Surrogate(A).prepare(A, damping=1.0), tmp_path / "state")


def test_a_generator_does_not_cost_the_fit(tmp_path: Path):
    A = ih.Diagonal(np.arange(6.0), psd=True)
    inverse = ih.NystroemSketch(rank=3, rng=np.random.default_rng(7)).prepare(A, damping=1.0)
    ih.save(inverse, tmp_path / "state")
    again = ih.load(tmp_path / "state")
    assert again.method == ih.NystroemSketch(rank=3, rng=0)
    np.testing.assert_allclose(again @ np.ones(6), inverse @ np.ones(6), rtol=1e-14)
    blocks = ih.BlockDiagonal({"a": A, "b": 2.0 * A})
    each = ih.Arnoldi(rank=2, rng=np.random.default_rng(7))
    ih.save(ih.Blockwise(each).prepare(blocks, damping=1.0), tmp_path / "state")
    assert ih.load(tmp_path / "state").method == ih.Blockwise(ih.Arnoldi(rank=2, rng=0))


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_multiplies_and_the_first_writes(rank: int, tmp_path: Path):
    products = []

    class Share(ih.LinearOperator):
        processes = SimpleNamespace(rank=rank, size=2)

        def _matmat(self, X: Any, /) -> Any:
            products.append(X.shape[1])
            return 2.0 * X

    inverse = ih.Arnoldi(rank=2).prepare(Share(3, like=np.zeros(0)), damping=1.0)
    before = len(products)
    ih.save(inverse, tmp_path / "state")
    assert products[before:] == [1]  # a sum over processes that one leaves out would hang
    assert (tmp_path / "state").exists() == (rank == 0)


def test_without_safetensors_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    inverse = ih.Direct().prepare(ih.Diagonal(np.ones(3)), damping=1.0)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"invhvp\[io\]"):
        ih.save(inverse, tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_is_loaded_only_when_it_is_needed():
    code = "import sys, invhvp; assert 'safetensors' not in sys.modules; print(invhvp.load)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.backends("torch-cpu-f32")
def test_a_program_without_torch_loads_what_torch_saved(backend: Backend, tmp_path: Path):
    inverse = INVERSES["sample-space-stacked"][0](backend)
    ih.save(inverse, tmp_path / "state")
    code = (
        "import sys, numpy as np, invhvp as ih\n"
        "inverse = ih.load(sys.argv[1])\n"
        "np.save(sys.argv[2], inverse.solve(np.ones(12, inverse.dtype)).x)\n"
        "assert 'torch' not in sys.modules and 'pickle' not in str(sys.modules.get('safetensors'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "state"), str(tmp_path / "x.npy")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = inverse.solve(backend.asarray(np.ones(12))).x
    close(np.load(tmp_path / "x.npy"), backend.to_numpy(expected), backend, 1e3)


@pytest.mark.backends("torch-cpu-f32")
def test_bfloat16_is_kept(backend: Backend, tmp_path: Path):
    import torch

    like = torch.ones(6, dtype=torch.bfloat16)
    inverse = ih.Direct().prepare(ih.Diagonal(like * 3.0), damping=1.0)
    ih.save(inverse, tmp_path / "state")
    again = ih.load(tmp_path / "state", like=like)
    assert (again @ like).dtype == torch.bfloat16
    assert torch.equal(again @ like, inverse @ like)
    with pytest.raises(ih.StateError, match="bfloat16"):
        ih.load(tmp_path / "state")
