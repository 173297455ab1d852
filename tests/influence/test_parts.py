"""Scores by block and by position against dense formulas."""

from __future__ import annotations

import numpy as np
import pytest

import invhvp as ih
from tests.gradients.cases import permuted_layout

LAMBDA = 1.0
METHODS = [ih.SampleSpace(), ih.Direct(), ih.BlockCG(rtol=1e-4)]


def network(seed: int, N: int, T: int) -> dict[str, np.ndarray]:
    """What a table of 5 words, a layer (3, 4) with a bias, and 6 free parameters leave behind."""
    rng = np.random.default_rng(seed)
    return {
        "indices": rng.integers(0, 5, (N, T)),
        "e": rng.standard_normal((N, T, 2)),
        "d": rng.standard_normal((N, T, 3)),
        "a": rng.standard_normal((N, T, 4)),
        "free": rng.standard_normal((N, 6)),
    }


def terms(data) -> dict[str, np.ndarray]:
    """Dense terms (N, T, size) of the blocks with positions, (N, size) of the others."""
    N, T = data["indices"].shape
    words = np.eye(5)[data["indices"]]
    return {
        "table": np.einsum("ntw,nte->ntwe", words, data["e"]).reshape(N, T, 10),
        "weight": np.einsum("nto,nti->ntoi", data["d"], data["a"]).reshape(N, T, 12),
        "bias": data["d"].sum(axis=1),
        "free": data["free"],
    }


def summed(parts) -> dict[str, np.ndarray]:
    return {name: part.sum(axis=1) if part.ndim == 3 else part for name, part in parts.items()}


def layout() -> ih.Layout:
    """[W | b] interleaved and free parameters shuffled, before a table."""
    blocks = {"table": ih.Block((5, 2), slice(21, 31)), **permuted_layout()}
    return ih.Layout(blocks)


def vector_order(parts) -> np.ndarray:
    whole = np.empty((len(parts["free"]), 31))
    for name, block in layout().items():
        whole[:, block.indices] = parts[name]
    return whole


def structured(backend, data) -> ih.StackedGradients:
    d, a, e = (backend.asarray(data[key]) for key in ("d", "a", "e"))
    blocks = {
        "table": ih.EmbeddingGradients(
            output_grads=e, indices=backend.integers(data["indices"]), n_rows=5
        ),
        "weight": ih.OuterProductGradients(output_grads=d, inputs=a),
        "bias": ih.DenseGradients(backend.asarray(data["d"].sum(axis=1))),
        "free": ih.DenseGradients(backend.asarray(data["free"])),
    }
    return ih.StackedGradients(blocks, layout=layout())


def streamed(G) -> ih.StreamedGradients:
    return ih.StreamedGradients([G[:1], G[1:4], G[4:]])


def solutions(train, test) -> np.ndarray:
    """x of every test sample in a row, by a dense float64 solve."""
    G = vector_order(summed(terms(train)))
    A = G.T @ G / len(G) + LAMBDA * np.eye(31)
    return np.linalg.solve(A, vector_order(summed(terms(test))).T).T


def close(backend, found, expected, method, scale):
    backend.assert_like(found)
    assert tuple(found.shape) == expected.shape
    allowed = (300 * backend.eps + (1e-3 if isinstance(method, ih.BlockCG) else 0)) * scale
    np.testing.assert_allclose(backend.to_numpy(found), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("form", [lambda G: G, streamed], ids=["held", "streamed"])
def test_parts_equal_dense_formulas_and_add_up(backend, method, T, form):
    train, test = network(0, 7, T), network(1, 3, 3)
    G, queries = form(structured(backend, train)), structured(backend, test)
    influence = ih.Influence(method.prepare(ih.RankOneMean(G), damping=LAMBDA), G)
    X, dense = solutions(train, test), terms(train)
    scores = backend.to_numpy(influence.scores(queries))
    rows = vector_order(summed(dense))
    scale = np.linalg.norm(X, axis=1).max() * np.linalg.norm(rows, axis=1).max()
    by_block = influence.scores_by_block(queries)
    assert list(by_block) == list(layout())
    for name, block in layout().items():
        expected = X[:, block.indices] @ summed(dense)[name].T
        close(backend, by_block[name], expected, method, scale)
    total = sum(backend.to_numpy(part) for part in by_block.values())
    np.testing.assert_allclose(total, scores, rtol=0, atol=300 * backend.eps * scale)
    by_position = influence.scores_by_position(queries)
    assert list(by_position) == ["table", "weight"]
    for name, part in by_position.items():
        expected = np.einsum("jp,ntp->jnt", X[:, layout()[name].indices], dense[name])
        close(backend, part, expected, method, scale)


@pytest.mark.parametrize("form", [lambda G: G, streamed], ids=["held", "streamed"])
def test_self_influence_by_block(backend, form):
    train = network(0, 7, 4)
    G = form(structured(backend, train))
    influence = ih.Influence(ih.SampleSpace().prepare(ih.RankOneMean(G), damping=LAMBDA), G)
    X, dense = solutions(train, train), summed(terms(train))
    own = influence.self_influence_by_block()
    for name, block in layout().items():
        expected = np.sum(X[:, block.indices] * dense[name], axis=1)
        close(backend, own[name], expected, None, np.abs(expected).max())
    total = sum(backend.to_numpy(part) for part in own.values())
    whole = backend.to_numpy(influence.self_influence())
    np.testing.assert_allclose(total, whole, rtol=300 * backend.eps)


def test_more_test_samples_than_are_solved_together(monkeypatch):
    from invhvp.influence import model

    backend = _Numpy()
    train, test = network(0, 7, 4), network(1, 5, 4)
    G, queries = structured(backend, train), structured(backend, test)
    influence = ih.Influence(ih.Direct().prepare(ih.RankOneMean(G), damping=LAMBDA), G)
    whole = influence.scores_by_position(queries), influence.scores_by_block(queries)
    own = influence.self_influence_by_block()
    monkeypatch.setattr(model, "TEST_BLOCK", 2)
    cut = influence.scores_by_position(queries), influence.scores_by_block(queries)
    for before, after in zip(
        [*whole, own], [*cut, influence.self_influence_by_block()], strict=True
    ):
        for name, part in before.items():
            np.testing.assert_allclose(after[name], part, rtol=1e-9, atol=1e-9)


class _Numpy:
    asarray = staticmethod(lambda a: np.asarray(a, dtype=np.float64))
    integers = staticmethod(np.asarray)


def test_batches_of_different_length_are_padded():
    backend = _Numpy()
    short, long = network(0, 2, 2), network(1, 3, 4)
    parts = [structured(backend, short), structured(backend, long)]
    G = ih.StreamedGradients(parts)
    identity = ih.Identity(31, like=np.ones(0))
    influence = ih.Influence(ih.Direct().prepare(identity, damping=0.0), G)
    query = parts[1][:1]
    x = vector_order(summed(terms(long)))[:1]
    found = influence.scores_by_position(query, blocks="weight")
    assert list(found) == ["weight"]
    assert found["weight"].shape == (1, 5, 4)
    indices = layout()["weight"].indices
    for start, data in ((0, short), (2, long)):
        expected = np.einsum("jp,ntp->jnt", x[:, indices], terms(data)["weight"])
        T = expected.shape[2]
        got = found["weight"][:, start : start + expected.shape[1], :]
        np.testing.assert_allclose(got[:, :, :T], expected, atol=1e-12)
        np.testing.assert_array_equal(got[:, :, T:], 0.0)


def test_blocks_in_name_only():
    """A layout over dense rows, and one block that is the whole matrix."""
    train, test = network(0, 7, 4), network(1, 3, 3)
    dense = ih.DenseGradients(vector_order(summed(terms(train))), layout=layout())
    queries = ih.DenseGradients(vector_order(summed(terms(test))))
    influence = ih.Influence(ih.Direct().prepare(ih.RankOneMean(dense), damping=LAMBDA), dense)
    X = solutions(train, test)
    for name, part in influence.scores_by_block(queries).items():
        expected = X[:, layout()[name].indices] @ summed(terms(train))[name].T
        np.testing.assert_allclose(part, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(
        TypeError, match=r"'table', 'weight', 'bias', 'free'.* keep no positions.*none"
    ):
        influence.scores_by_position(queries)
    alone = ih.OuterProductGradients(
        output_grads=train["d"], inputs=train["a"], layout=ih.Layout.from_shapes({"w": (3, 4)})
    )
    identity = ih.Identity(12, like=np.ones(0))
    influence = ih.Influence(ih.Direct().prepare(identity, damping=0.0), alone)
    np.testing.assert_allclose(influence.scores_by_block(alone)["w"], influence.scores(alone))
    by_position = influence.scores_by_position(alone)["w"]
    np.testing.assert_allclose(by_position.sum(axis=2), influence.scores(alone))


def test_the_door_is_shut_before_anything_is_solved():
    class Untouched:
        shape = (31, 31)

        def solve(self, rows):
            raise AssertionError("solved")

    G = structured(_Numpy(), network(0, 7, 4))
    influence = ih.Influence(Untouched(), G)
    with pytest.raises(TypeError, match=r"\['bias'\] keep no positions.*\['table', 'weight'\]"):
        influence.scores_by_position(G, blocks=["weight", "bias"])
    with pytest.raises(ValueError, match=r"no blocks \['wieght'\]; the gradients have"):
        influence.scores_by_position(G, blocks="wieght")
    with pytest.raises(TypeError, match="keep no positions"):
        influence.scores_by_position(G, blocks=[])
    with pytest.raises(ValueError, match="12 columns"):
        influence.scores_by_block(ih.DenseGradients(np.ones((1, 12))))
    unnamed = ih.Influence(Untouched(), ih.DenseGradients(np.ones((2, 31))))
    for compute in (
        lambda: unnamed.scores_by_block(G),
        lambda: unnamed.scores_by_position(G),
        unnamed.self_influence_by_block,
    ):
        with pytest.raises(TypeError, match="no named blocks"):
            compute()
