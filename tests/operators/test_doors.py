"""What operators refuse, by which error, and what the error says."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest

from invhvp.gradients import DenseGradients
from invhvp.layout import Layout
from invhvp.operators import (
    BlockDiagonal,
    Callback,
    Damped,
    Dense,
    Diagonal,
    Identity,
    LowRank,
    RankOneMean,
)
from invhvp.operators.damping import as_shift, smallest
from tests.backends import Backend
from tests.cases import LAYOUT, OPERATORS, N

NAMES = sorted(OPERATORS)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes(backend: Backend, name: str):
    A, _ = OPERATORS[name](backend)
    for shape in ((N + 1,), (N - 1, 2), (), (N, 2, 1)):
        with pytest.raises(ValueError, match=f"{N} x {N}"):
            A @ backend.asarray(np.zeros(shape))
    with pytest.raises(ValueError, match="pass the transpose"):
        A @ backend.asarray(np.zeros((3, N)))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_dtype(backend: Backend, name: str):
    A, _ = OPERATORS[name](backend)
    with pytest.raises(TypeError, match="nothing is converted silently"):
        A @ backend.integers(np.zeros(N))
    if backend.name not in ("jax-f32", "strict-no_float64"):
        other = np.float64 if backend.np_dtype == np.float32 else np.float32
        with pytest.raises(TypeError, match=r"float32.*float64|float64.*float32"):
            A @ backend.place(np.zeros(N, dtype=other))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_kind(backend: Backend, name: str):
    A, _ = OPERATORS[name](backend)
    foreign = array_api_strict.zeros(N) if backend.name.startswith("numpy") else np.zeros(N)
    with pytest.raises(TypeError, match="array"):
        A @ foreign
    for thing in ([0.0] * N, 1.0, None):
        with pytest.raises(TypeError):
            A @ thing


@pytest.mark.backends("strict-device1")
@pytest.mark.parametrize("name", NAMES)
def test_wrong_device(backend: Backend, name: str):
    A, _ = OPERATORS[name](backend)
    with pytest.raises(TypeError, match="device"):
        A @ array_api_strict.zeros(N, device=array_api_strict.Device("CPU_DEVICE"))


def test_summands_must_match(backend: Backend):
    A, _ = OPERATORS["dense"](backend)
    with pytest.raises(ValueError, match="shapes"):
        A + Identity(N + 1, like=backend.asarray([]))
    foreign = array_api_strict.ones(N) if backend.name.startswith("numpy") else np.ones(N)
    with pytest.raises(TypeError, match="summand"):
        A + Diagonal(foreign)
    for factor in (backend.asarray(2.0), "2", None):
        with pytest.raises(TypeError, match="Python float"):
            A.__mul__(factor)
    for factor in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            factor * A
    with pytest.raises(TypeError):
        A + 1.0


def test_constructors_refuse_what_is_no_operator(backend: Backend):
    like = backend.asarray([])
    with pytest.raises(ValueError, match="square"):
        Dense(backend.asarray(np.zeros((2, 3))))
    with pytest.raises(ValueError, match="not symmetric"):
        Dense(backend.asarray([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"\(n,\)"):
        Diagonal(backend.asarray([[1.0]]))
    with pytest.raises(ValueError, match="shapes"):
        LowRank(backend.asarray(np.ones((3, 2))), backend.asarray(np.ones(3)))
    with pytest.raises(ValueError, match="rank"):
        LowRank(backend.asarray(np.ones((2, 3))), backend.asarray(np.ones(3)))
    with pytest.raises(ValueError, match="at least one"):
        Callback(lambda X: X, 0, like=like)
    with pytest.raises(TypeError, match="floating"):
        Dense(backend.integers(np.eye(2)))
    with pytest.raises(ValueError, match="layout"):
        Identity(N + 1, like=like, layout=LAYOUT)
    with pytest.raises(ValueError, match="count"):
        RankOneMean(DenseGradients(backend.asarray(np.eye(2))), count=0.0)
    with pytest.raises(ValueError, match="at least one block"):
        BlockDiagonal({})
    block = Identity(2, like=like)
    for layout in (Layout.from_shapes({"a": (3,)}), Layout.from_shapes({"b": (2,)})):
        with pytest.raises(ValueError, match="sizes"):
            BlockDiagonal({"a": block}, layout)
    with pytest.raises(TypeError, match="share"):
        BlockDiagonal({"a": block, "b": Diagonal(_foreign(backend))})


def _foreign(backend: Backend):
    return array_api_strict.ones(2) if backend.name.startswith("numpy") else np.ones(2)


def test_callbacks_must_return_what_was_promised(backend: Backend):
    like, x = backend.asarray([]), backend.asarray(np.ones(3))
    with pytest.raises(ValueError, match=r"shape \(3, 1\)"):
        Callback(lambda X: X[:2, :], 3, like=like) @ x
    with pytest.raises(TypeError, match="NoneType"):
        Callback(lambda X: None, 3, like=like) @ x
    with pytest.raises(TypeError, match="int32"):
        Callback(lambda X: backend.xp.astype(X, backend.xp.int32), 3, like=like) @ x
    with pytest.raises(TypeError, match="array"):
        Callback(lambda X: _foreign(backend)[:1, None] * np.ones((3, 1)), 3, like=like) @ x


@pytest.mark.parametrize("damping", [-1.0, -1e-30, float("nan"), float("inf")])
def test_damping_out_of_range(backend: Backend, damping: float):
    A, _ = OPERATORS["dense"](backend)
    for value in (damping, {"weight": 1.0, "bias": damping}, np.float64(damping)):
        with pytest.raises(ValueError, match="finite and not negative"):
            as_shift(value, A)


@pytest.mark.parametrize("damping", ["1", None, True, [1.0], 1j])
def test_damping_of_a_wrong_kind(backend: Backend, damping):
    A, _ = OPERATORS["dense"](backend)
    with pytest.raises(TypeError, match="damping must be"):
        as_shift(damping, A)


def test_damping_arrays(backend: Backend):
    A, _ = OPERATORS["dense"](backend)
    assert as_shift(backend.asarray(0.5), A) == 0.5
    assert as_shift(2, A) == 2.0
    with pytest.raises(TypeError, match="damping must be"):
        as_shift(backend.asarray(np.ones(N)), A)
    shift = as_shift({"weight": 0.5, "bias": 2.0}, A)
    backend.assert_like(shift)
    assert shift.shape == (N,)
    assert smallest(shift) == 0.5


def test_damping_by_block_names_what_is_missing(backend: Backend):
    A, _ = OPERATORS["dense"](backend)
    with pytest.raises(ValueError, match="missing: \\['bias'\\]"):
        A.inverse({"weight": 1.0})
    with pytest.raises(ValueError, match="Layout"):
        as_shift({"weight": 1.0}, Identity(2, like=backend.asarray([])))


@pytest.mark.parametrize("name", NAMES)
def test_damped_is_the_sum(backend: Backend, name: str):
    A, M = OPERATORS[name](backend)
    X = np.random.default_rng(0).standard_normal((N, 2)).astype(backend.np_dtype)
    for damping, shift in ((0.25, np.full(N, 0.25)), ({"weight": 1.0, "bias": 0.5}, None)):
        if shift is None and A.layout is None:
            with pytest.raises(ValueError, match="Layout"):
                Damped(A, damping)
            continue
        if shift is None:
            shift = A.layout.shifts(damping)
        got = backend.to_numpy(Damped(A, damping) @ backend.asarray(X))
        allowed = 30 * backend.eps * (np.linalg.norm(M, 2) + 1) * np.linalg.norm(X)
        assert np.linalg.norm(got - (M @ X + shift[:, None] * X)) <= allowed
