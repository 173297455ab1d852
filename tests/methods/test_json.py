"""Methods survive the way through JSON; what cannot is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest

import invhvp as ih
from tests.cases import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_round_trip_of_every_method(name):
    method = METHODS[name]()
    text = json.dumps(ih.method_to_dict(method), allow_nan=False)
    again = ih.method_from_dict(json.loads(text))
    assert again == method
    assert type(again) is type(method)


@pytest.mark.parametrize(
    "method",
    [
        ih.BlockCG(rtol=1e-3, atol=1e-9, etol=1e-2, maxiter=7, max_seconds=2.5, check_every=None),
        ih.BlockCG(preconditioner=ih.NystroemPreconditioner(rank="adaptive", rng=3)),
        ih.Minres(preconditioner=ih.Jacobi(samples=4), max_restarts=0),
        ih.LiSSA(scale=12.5, preconditioner=ih.Direct(max_size=50), variance_reduction="svrg"),
        ih.Arnoldi(rank=3, complement="drop"),
        ih.NystroemSketch(sketch="columns", max_rank=np.int64(9)),
    ],
    ids=repr,
)
def test_options_and_preconditioners_are_kept(method):
    stored = json.loads(json.dumps(ih.method_to_dict(method)))
    assert ih.method_from_dict(stored) == method


def test_missing_options_have_their_defaults():
    assert ih.method_from_dict({"method": "CG", "rtol": 1e-3}) == ih.CG(rtol=1e-3)


A = ih.Diagonal(np.ones(3))


@pytest.mark.parametrize(
    ("method", "what"),
    [
        (ih.Surrogate(A), "Surrogate.*operator or an inverse"),
        (ih.BlockCG(preconditioner=ih.Surrogate(A)), "Surrogate"),
        (ih.CG(preconditioner=ih.Fixed(ih.Direct().prepare(A, damping=1.0))), "Fixed"),
        (ih.BlockCG(residual_operator=A), "residual_operator.*Diagonal"),
        (ih.BlockCG(reduce=lambda x: x), "reduce.*function"),
        (ih.Jacobi(rng=np.random.default_rng(0)), "rng.*Generator.*pass an int"),
        (A, "Diagonal cannot be stored"),
    ],
)
def test_what_is_not_a_plain_value_is_refused(method, what):
    with pytest.raises(TypeError, match=what):
        ih.method_to_dict(method)


def test_a_class_of_the_same_name_is_not_ours():
    class CG:
        pass

    with pytest.raises(TypeError, match="CG cannot be stored"):
        ih.method_to_dict(CG())


@pytest.mark.parametrize(
    ("stored", "error", "what"),
    [
        ({"method": "Newton"}, ValueError, "no method 'Newton'"),
        ({"method": "CG", "tolerance": 1.0}, ValueError, "no option tolerance"),
        ({"method": "CG", "rtol": -1.0}, ValueError, "rtol must be"),
        ({"rtol": 1.0}, TypeError, "key"),
        ("CG", TypeError, "mapping"),
    ],
)
def test_what_was_not_stored_by_us_is_refused(stored, error, what):
    with pytest.raises(error, match=what):
        ih.method_from_dict(stored)
