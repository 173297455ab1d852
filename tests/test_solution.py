from __future__ import annotations

import json

import numpy as np
import pytest

from invhvp.solution import (
    ConvergenceError,
    Curvature,
    IndefiniteError,
    Record,
    Solution,
    Status,
)
from tests.backends import Backend


def a_solution(backend: Backend, *statuses: Status, **changes) -> Solution:
    k = len(statuses)
    codes = np.array([s.code for s in statuses], dtype=np.int8)
    values = {
        "x": backend.asarray(np.ones((4, k))),
        "status_codes": backend.place(codes),
        "residual_norms": backend.asarray(np.arange(k) / 8),
        "relative_residuals": backend.asarray(np.arange(k) / 16),
        "error_bounds": backend.asarray(np.full(k, np.inf)),
        "error_norm": "A",
        "iterations": 3,
        "products": 7,
        "passes": 4,
    }
    return Solution(**(values | changes))


def test_codes_are_stable_and_decode(backend: Backend):
    solution = a_solution(backend, *Status)
    assert solution.status == tuple(Status)
    assert [s.code for s in Status] == list(range(len(Status)))
    assert solution.first_column().status is Status.CONVERGED


def test_converged_is_an_array_on_the_device(backend: Backend):
    converged = a_solution(backend, *Status).converged
    assert converged.dtype == backend.xp.bool
    names = [s.name for s, c in zip(Status, backend.to_numpy(converged), strict=True) if c]
    assert names == ["CONVERGED", "ZERO"]


def test_every_status_says_what_to_do():
    remedies = [s for s in Status if not s.ok]
    assert all(len(s.value) > 20 for s in remedies)
    assert not any(s.ok and s.meaningless for s in Status)


def test_first_column_drops_the_axis(backend: Backend):
    one = a_solution(backend, Status.MAXITER).first_column()
    assert one.x.shape == (4,)
    for name in ("status_codes", "residual_norms", "relative_residuals", "error_bounds"):
        assert getattr(one, name).shape == ()
    assert one.status is Status.MAXITER


def test_describe_names_columns_and_the_worst_residual(backend: Backend):
    assert a_solution(backend, Status.CONVERGED, Status.ZERO).describe() is None
    text = a_solution(backend, Status.CONVERGED, *[Status.MAXITER] * 7, Status.NONFINITE).describe()
    assert text is not None
    assert "MAXITER in columns 1, 2, 3, 4, 5, ...: " in text
    assert "NONFINITE in column 8: " in text
    assert "5.00e-01" in text


def test_the_worst_residual_may_be_nan(backend: Backend):
    relative = backend.asarray([0.5, np.nan])
    text = a_solution(
        backend, Status.MAXITER, Status.NONFINITE, relative_residuals=relative
    ).describe()
    assert text is not None
    assert "nan" in text


def test_raise_if_failed(backend: Backend):
    good = a_solution(backend, Status.CONVERGED, Status.ZERO, Status.APPROXIMATE)
    assert good.raise_if_failed() is good
    assert good.raise_if_meaningless() is good
    late = a_solution(backend, Status.MAXITER)
    assert late.raise_if_meaningless() is late
    with pytest.raises(ConvergenceError, match="MAXITER") as caught:
        late.raise_if_failed()
    assert caught.value.solution is late


@pytest.mark.parametrize("status", [s for s in Status if s.meaningless])
def test_meaningless_columns_raise(backend: Backend, status: Status):
    with pytest.raises(ConvergenceError, match=status.name):
        a_solution(backend, Status.CONVERGED, status).raise_if_meaningless()


def test_negative_curvature_carries_its_proof(backend: Backend):
    proof = Curvature(backend.asarray([1.0, 0.0, 0.0, 0.0]), -0.25)
    solution = a_solution(backend, Status.NEGATIVE_CURVATURE, curvature=proof)
    with pytest.raises(IndefiniteError, match=r"must exceed 0\.25") as caught:
        solution.raise_if_failed()
    assert caught.value.vector is proof.vector
    assert caught.value.curvature == -0.25
    assert caught.value.minimum_damping == 0.25
    assert isinstance(caught.value, ValueError)


def test_to_dict_is_json(backend: Backend):
    history = (Record(iteration=1, products=2, seconds=0.5, relative_residuals=np.array([0.5])),)
    for solution in (
        a_solution(backend, Status.MAXITER, Status.CONVERGED, history=history),
        a_solution(backend, Status.ZERO).first_column(),
    ):
        loaded = json.loads(json.dumps(solution.to_dict()))
        assert loaded["products"] == 7
    assert loaded["status"] == "ZERO"
    assert loaded["residual_norms"] == 0.0


def test_status_is_one_planned_transfer(backend: Backend, host_transfers):
    solution = a_solution(backend, Status.CONVERGED, Status.ZERO)
    host_transfers.reset()
    assert solution.converged.shape == (2,)
    assert host_transfers.calls == 0
    assert len(solution.status) == 2
    assert host_transfers.calls == 1


def test_empty_block(backend: Backend):
    solution = a_solution(backend)
    assert solution.status == ()
    assert solution.raise_if_failed() is solution
