from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from invhvp.layout import Block, Layout
from tests.backends import Backend
from tests.cases import LAYOUT, PERMUTED, N


def a_layout(draw_sizes: list[int], order: np.ndarray) -> Layout:
    """Blocks of these sizes on the positions `order`, cut one after the other."""
    cuts = np.cumsum(draw_sizes)[:-1]
    parts = np.split(order, cuts)
    return Layout({f"block{i}": Block((p.size,), p) for i, p in enumerate(parts)})


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_assemble_undoes_take(backend: Backend, sizes: list[int], seed: int):
    rng = np.random.default_rng(seed)
    layout = a_layout(sizes, rng.permutation(sum(sizes)))
    for shape in ((layout.n,), (layout.n, 3)):
        x = rng.standard_normal(shape).astype(backend.np_dtype)
        X = backend.asarray(x)
        parts = {name: layout.take(X, name) for name in reversed(layout.names)}
        for name, part in parts.items():
            backend.assert_like(part)
            np.testing.assert_array_equal(backend.to_numpy(part), x[layout[name].indices])
        back = layout.assemble(parts)
        backend.assert_like(back)
        np.testing.assert_array_equal(backend.to_numpy(back), x)


def test_contiguous_blocks_are_slices():
    assert LAYOUT["bias"].indices == slice(8, 12)
    assert LAYOUT.n == N
    assert LAYOUT.names == ("weight", "bias")
    assert Layout({"a": Block((2,), np.array([0, 1]))})["a"].indices == slice(0, 2)
    assert not isinstance(PERMUTED["bias"].indices, slice)


def test_contiguous_blocks_are_views():
    X = np.zeros((N, 2))
    assert np.shares_memory(LAYOUT.take(X, "weight"), X)


def test_a_permuted_block_is_not_taken_for_a_range():
    """First and last index and the size agree with a range; the order does not."""
    layout = Layout({"a": Block((4,), np.array([0, 2, 1, 3]))})
    np.testing.assert_array_equal(layout.take(np.arange(4.0), "a"), [0.0, 2.0, 1.0, 3.0])


def test_blocks_in_another_order_than_the_parameters():
    layout = Layout({"late": Block((2,), slice(3, 5)), "early": Block((3,), slice(0, 3))})
    x = np.arange(5.0)
    parts = {name: layout.take(x, name) for name in layout}
    np.testing.assert_array_equal(layout.assemble(parts), x)


@given(weight=st.floats(0, 10), bias=st.floats(0, 10))
def test_shifts_put_each_damping_at_its_block(weight: float, bias: float):
    shifts = PERMUTED.shifts({"bias": bias, "weight": weight})
    np.testing.assert_array_equal(shifts[[0, 1, 2, 3, 8, 9, 10, 11]], weight)
    np.testing.assert_array_equal(shifts[[4, 5, 6, 7]], bias)


@pytest.mark.parametrize(
    "blocks",
    [
        {"a": Block((2,), slice(0, 2)), "b": Block((2,), slice(1, 3))},  # overlap
        {"a": Block((2,), slice(0, 2)), "b": Block((2,), slice(3, 5))},  # a hole
        {"a": Block((2,), np.array([0, 0]))},
        {"a": Block((2,), np.array([0, -1]))},
        {"a": Block((2,), np.array([0, 9]))},
        {"a": Block((2, 2), slice(0, 3))},
        {"a": Block((3,), np.array([0, 1]))},
        {"a": Block((2,), slice(0, 4, 2)), "b": Block((2,), slice(1, 4, 2))},
        {"a": Block((2,), slice(None, 2))},
        {"a": Block((2,), np.array([0.0, 1.0]))},
    ],
)
def test_what_is_no_partition_is_refused(blocks: dict[str, Block]):
    with pytest.raises((ValueError, TypeError)):
        Layout(blocks)


def test_missing_and_unknown_blocks_are_named():
    with pytest.raises(ValueError, match="bias"):
        LAYOUT.assemble({"weight": np.zeros(8)})
    with pytest.raises(ValueError, match="missing: \\['bias'\\]"):
        LAYOUT.shifts({"weight": 1.0})
    with pytest.raises(ValueError, match="unknown: \\['gain'\\]"):
        LAYOUT.shifts({"weight": 1.0, "bias": 1.0, "gain": 1.0})
    with pytest.raises(KeyError):
        LAYOUT.take(np.zeros(N), "gain")


def test_blocks_of_a_wrong_size_are_not_assembled():
    with pytest.raises(ValueError, match="bias"):
        LAYOUT.assemble({"weight": np.zeros(8), "bias": np.zeros(3)})
    with pytest.raises(ValueError, match="weight"):
        PERMUTED.assemble({"weight": np.zeros(9), "bias": np.zeros(4)})


def test_repr_shows_shapes():
    assert repr(LAYOUT) == "Layout(weight 2x4, bias 4)"
    assert repr(Layout.from_shapes({"scale": ()})) == "Layout(scale scalar)"
