"""Blocks side by side: positions, structure and errors."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from invhvp.gradients import DenseGradients, OuterProductGradients, StackedGradients, concatenate
from invhvp.layout import Block, Layout


def blocks(N: int = 3, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    d, a = rng.standard_normal((N, 2)), rng.standard_normal((N, 3))
    weight = OuterProductGradients(output_grads=d, inputs=a)
    return {"w": weight, "b": DenseGradients(d)}


def test_default_layout_is_one_block_after_the_other():
    G = StackedGradients(blocks())
    assert G.layout.names == ("w", "b")
    assert G.layout["w"].shape == (2, 3)
    assert G.layout["b"].indices == slice(6, 8)
    assert G.nbytes == 3 * (2 + 3 + 2) * 8


def test_blocks_are_read_only():
    G = StackedGradients(blocks())
    assert list(G.blocks) == ["w", "b"]
    with pytest.raises(TypeError):
        G.blocks["w"] = None


def test_blocks_may_be_named_in_another_order():
    layout = Layout.from_shapes({"b": (2,), "w": (2, 3)})
    G, plain = StackedGradients(blocks(), layout=layout), StackedGradients(blocks())
    order = np.concatenate([np.arange(6, 8), np.arange(6)])
    np.testing.assert_array_equal(G.to_dense(), plain.to_dense()[:, order])
    np.testing.assert_allclose(G.gram(), plain.gram())


def test_gram_falls_back_where_positions_differ():
    G = StackedGradients(blocks(3))
    shuffled = np.random.default_rng(1).permutation(8)
    layout = Layout({"w": Block((2, 3), shuffled[:6]), "b": Block((2,), shuffled[6:])})
    H = StackedGradients(blocks(4, seed=1), layout=layout)
    np.testing.assert_allclose(G.gram(H), G.to_dense() @ H.to_dense().T, rtol=1e-13)
    np.testing.assert_allclose(H.gram(G), H.to_dense() @ G.to_dense().T, rtol=1e-13)
    with pytest.raises(ValueError, match="blocks and layouts are the same"):
        concatenate([G, H])


def test_equal_layouts_need_not_be_one_object():
    shuffled = np.random.default_rng(1).permutation(8)

    def make(N: int) -> StackedGradients:
        layout = Layout({"w": Block((2, 3), shuffled[:6]), "b": Block((2,), shuffled[6:])})
        return StackedGradients(blocks(N), layout=layout)

    assert concatenate([make(2), make(3)]).shape == (5, 8)


def test_a_gram_matrix_of_large_blocks_forms_no_rows():
    rng = np.random.default_rng(0)
    d = rng.standard_normal((8, 1000)).astype(np.float32)
    weight = OuterProductGradients(output_grads=d, inputs=d)
    G = StackedGradients({"w": weight, "b": DenseGradients(d)})
    tracemalloc.start()
    G.gram(G[1:4])
    G.row_norms()
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"b": np.ones((3, 2))}, TypeError, "'b' must be a gradient matrix, got ndarray"),
        ({"b": DenseGradients(np.ones((4, 2)))}, ValueError, "3 samples in 'w' and 4 in 'b'"),
        (
            {"b": DenseGradients(np.ones((3, 2), dtype=np.float32))},
            TypeError,
            "block 'b',.* float64, got float32",
        ),
    ],
)
def test_blocks_that_do_not_fit(change, error, said):
    with pytest.raises(error, match=said):
        StackedGradients({**blocks(), **change})


def test_layouts_that_do_not_fit():
    with pytest.raises(ValueError, match="at least one block"):
        StackedGradients({})
    with pytest.raises(ValueError, match=r"the layout names the blocks \['w'\]"):
        StackedGradients(blocks(), layout=Layout.from_shapes({"w": (2, 3)}))
    with pytest.raises(ValueError, match="'w' has 6 parameters, the layout 4"):
        StackedGradients(blocks(), layout=Layout.from_shapes({"w": (2, 2), "b": (2,)}))
