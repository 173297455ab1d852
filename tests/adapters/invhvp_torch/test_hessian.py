from __future__ import annotations

import copy
import gc
import json
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import invhvp_torch as it
from invhvp.protocols import HasTerms
from invhvp.testing import check_operator
from invhvp_torch import recorded, survey
from invhvp_torch.columns import Scratch
from invhvp_torch.double_backward import GradientGraph
from invhvp_torch.tape import Tape
from tests.adapters.invhvp_torch.models import (
    BY_NAME,
    CASES,
    Twice,
    assert_close,
    cross_entropy,
    reference,
)

MLP = BY_NAME["mlp"]


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_dense_hessian_of_the_mean_loss(case, keep_graph):
    model, x, y = case.build()
    H = it.hessian(model, case.loss, (x, y), keep_graph=keep_graph)
    expected, _ = reference(model, case.loss, x, y)
    for _ in range(2):  # the second product comes from the kept graphs
        assert_close(H.to_dense(), expected)
    v = torch.linspace(-1, 1, H.shape[0], dtype=H.dtype)
    assert_close(H @ v, expected @ v)
    X = torch.randn(H.shape[0], 3, dtype=H.dtype, generator=torch.Generator().manual_seed(0))
    assert_close(H @ X, expected @ X)
    assert H.layout.names == tuple(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_float32_is_float32_and_as_exact_as_it_can_be(name):
    case = BY_NAME[name]
    model, x, y = case.build(dtype=torch.float32)
    expected, _ = reference(
        copy.deepcopy(model).double(), case.loss, x if case.tokens else x.double(), y
    )
    H = it.hessian(model, case.loss, (x, y))
    assert H.dtype == torch.float32
    assert_close(H.to_dense(), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_an_operator_by_the_public_check(dtype):
    model, x, y = MLP.build(dtype=dtype)
    check_operator(it.hessian(model, cross_entropy, (x, y)))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("cache", [True, False])
def test_batch_size_and_a_short_last_batch_change_nothing(batch_size, cache):
    model, x, y = MLP.build()
    expected, _ = reference(model, cross_entropy, x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size)
    for data, size in ((loader, None), ((x, y), batch_size)):
        H = it.hessian(model, cross_entropy, data, cache=cache, batch_size=size)
        assert_close(H.to_dense(), expected)
        assert ("cached" if cache else "streamed") in repr(H)
        # Small batches of a loader go through as one; those asked for by size stay as they are.
        n_batches = 1 if cache and size is None else -(-7 // batch_size)
        assert f"7 samples in {n_batches} batch" in repr(H)


def test_the_order_of_the_data_changes_nothing():
    model, x, y = MLP.build()
    order = torch.tensor([3, 0, 6, 5, 1, 2, 4])
    batches = [(x[order[:5]], y[order[:5]]), (x[order[5:]], y[order[5:]])]
    expected, _ = reference(model, cross_entropy, x, y)
    assert_close(it.hessian(model, cross_entropy, batches).to_dense(), expected)
    # One read of a shuffling loader fixes an order, and any order will do.
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    assert_close(it.hessian(model, cross_entropy, loader).to_dense(), expected)


def test_many_columns_and_few_are_the_same():
    model, x, y = MLP.build()
    H = it.hessian(model, cross_entropy, (x, y), batch_size=3)
    X = torch.randn(H.shape[0], 70, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    Y = H @ X
    for j in (0, 1, 69):
        assert_close(H @ X[:, j], Y[:, j])
    assert_close(H @ X.T.contiguous().T, Y)
    assert (H @ X[:, :0]).shape == (H.shape[0], 0)


# ------------------------------------------------------------------------ ways to a product


@pytest.mark.parametrize("way", ["graph", "column by column", "all at once"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_ways_to_a_product_give_the_same_values(case, way, monkeypatch):
    monkeypatch.setattr(recorded, "_MAX_NODES", -1 if way == "graph" else 10_000)
    monkeypatch.setattr(recorded, "_CACHE_BYTES", 1e9 if way == "all at once" else 0)
    model, x, y = case.build()
    H = it.hessian(model, case.loss, (x, y), keep_graph=True)
    expected, _ = reference(model, case.loss, x, y)
    X = torch.randn(H.shape[0], 6, dtype=H.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        assert_close(H @ X, expected @ X)
        assert_close(H @ X[:, 0], expected @ X[:, 0])
    kept = GradientGraph if way == "graph" else recorded.RecordedProducts
    assert isinstance(H._kept[0], kept)


PARTIAL = {  # operations whose gradient has parts that nobody needs, or none at all
    "layer norm first": (
        lambda: torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)), None
    ),
    "no affine": (
        lambda: torch.nn.Sequential(
            torch.nn.Linear(4, 5), torch.nn.LayerNorm(5, elementwise_affine=False),
            torch.nn.Tanh(), torch.nn.Linear(5, 3),
        ), None,
    ),
    "weights of a batch norm": (
        lambda: torch.nn.Sequential(
            torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
        ), "*.weight",
    ),
    "linear in some of them": (
        lambda: torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("loss", [torch.nn.functional.mse_loss, torch.nn.functional.l1_loss])
@pytest.mark.parametrize("name", PARTIAL)
def test_what_a_recording_lacks_is_zero_or_left_to_the_graph(name, loss, monkeypatch):
    build, parameters = PARTIAL[name]
    torch.manual_seed(0)
    model = build().double().eval()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    H = it.hessian(model, loss, (x, y), parameters=parameters)
    X = torch.randn(H.shape[0], 5, dtype=torch.float64)
    recorded_ = [H @ X, H @ X[:, 0]]
    monkeypatch.setattr(recorded, "_MAX_NODES", -1)
    plain = it.hessian(model, loss, (x, y), parameters=parameters)
    assert_close(recorded_[0], plain @ X)
    assert_close(recorded_[1], plain @ X[:, 0])


def test_a_recording_that_fails_leaves_the_graph(monkeypatch):
    model, x, y = MLP.build()

    def fail(*_):
        raise IndexError

    monkeypatch.setattr(Tape, "add", fail)
    H = it.hessian(model, cross_entropy, (x, y))
    assert_close(H.to_dense(), reference(model, cross_entropy, x, y)[0])
    assert isinstance(H._kept[0], GradientGraph)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_small_batches_are_joined_as_far_as_they_stay_small(batch_size, monkeypatch):
    model, x, y = MLP.build()
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size)
    expected, _ = reference(model, cross_entropy, x, y)
    one = it.hessian(model, cross_entropy, loader)._bytes_per_sample
    for room, n_batches in ((1e9, 1), (5.5 * one, 2), (0, -(-7 // batch_size))):
        monkeypatch.setattr(survey, "JOINED_BYTES", room)
        H = it.hessian(model, cross_entropy, loader)
        assert f"7 samples in {n_batches} batch" in repr(H)
        assert_close(H.to_dense(), expected)
        assert_close(H.subset([4, 0]).to_dense(), _mean_over(model, x, y, [4, 0]))


def _mean_over(model, x, y, rows):
    return reference(model, cross_entropy, x[rows], y[rows])[0]


def test_batches_in_training_mode_are_not_joined():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    _, x, y = MLP.build()
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    H = it.hessian(model, cross_entropy, loader, training=True)
    assert "3 batches" in repr(H)
    one = it.hessian(model, cross_entropy, (x[:3], y[:3]), training=True)
    rest = it.hessian(model, cross_entropy, loader, training=True, keep_graph=False)
    assert_close(H.to_dense(), rest.to_dense())
    assert not torch.allclose(one.to_dense(), H.to_dense())


class _ThroughNumpy(torch.autograd.Function):
    """Three times x, where torch does not see it."""

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(3 * x.detach().numpy())

    @staticmethod
    def backward(ctx, g):
        return _ThroughNumpy.apply(g)


def test_what_a_recording_cannot_see_stays_with_autograd():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x):
            return _ThroughNumpy.apply(torch.tanh(self.layer(x)))

    class Plain(Model):
        def forward(self, x):
            return 3 * torch.tanh(self.layer(x))

    _, x, y = MLP.build()
    model, plain = Model(), Plain()
    plain.load_state_dict(model.state_dict())
    H = it.hessian(model, cross_entropy, (x, y))
    for _ in range(2):
        assert_close(H.to_dense(), reference(plain, cross_entropy, x, y)[0])
    assert isinstance(H._kept[0], GradientGraph)


def test_a_wrong_recording_is_not_used(monkeypatch):
    model, x, y = MLP.build()
    first = []

    def constant(self, vectors, totals, scratch):
        first.append(vectors)
        for total in totals:
            total += 1.0

    monkeypatch.setattr(Tape, "add", constant)
    H = it.hessian(model, cross_entropy, (x, y))
    assert_close(H.to_dense(), reference(model, cross_entropy, x, y)[0])
    assert first
    assert isinstance(H._kept[0], GradientGraph)


def test_products_ignore_the_callers_modes():
    model, x, y = MLP.build(dtype=torch.float32)
    H = it.hessian(model, cross_entropy, (x, y))
    v = torch.linspace(-1, 1, H.shape[0])
    expected = H @ v
    for mode in (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode(),
        torch.no_grad(),
        torch.enable_grad(),
    ):
        with mode:
            assert torch.equal(H @ v, expected)
            assert not (H @ v).requires_grad


def test_a_tape_is_shorter_than_what_it_recorded():
    c = torch.linspace(0.1, 2.0, 5, dtype=torch.float64)
    calls = []

    def linear(v, w):
        calls.append(v)
        zero = torch.zeros_like(v)
        return [torch.mul(torch.mul(v, c), c.exp()) + zero - torch.mul(v, c), None, w.t().t() @ c]

    v, w = torch.ones(5, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64)
    tape = Tape(linear, [v, w])
    x, W = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64)
    assert tape.outputs == [0, 2]
    scratch = Scratch()
    for k in (4, 1, 4):  # buffers of one call serve the next
        found = [torch.ones(k, 5, dtype=c.dtype), torch.zeros(k, 2, dtype=c.dtype)]
        tape.add([x[:k], W[:k]], found, scratch)
        assert torch.allclose(found[0] - 1, x[:k] * (c * c.exp() - c), rtol=1e-14)
        assert torch.allclose(found[1], W[:k] @ c, rtol=1e-14)
    assert len(calls) == 1  # recorded
    assert tape.n_operations == 2  # one factor, one product


def test_sample_weights_weigh_the_samples():
    model, x, y = MLP.build()
    w = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 3.0, 0.25], dtype=x.dtype)
    loader = DataLoader(TensorDataset(x, y, w), batch_size=3)
    H = it.hessian(model, cross_entropy, loader)
    rows = [reference(model, cross_entropy, x[i : i + 1], y[i : i + 1])[0] for i in range(7)]
    expected = sum(float(w[i]) * rows[i] for i in range(7)) / float(w.sum())
    assert_close(H.to_dense(), expected)
    with pytest.raises(ValueError, match="positive sum"):
        it.hessian(model, cross_entropy, (x, y, 0 * w))
    with pytest.raises(ValueError, match=r"shape \(7,\)"):
        it.hessian(model, cross_entropy, [(x, y, w[:, None])])


# ---------------------------------------------------------------------------------- parameters


def test_a_selection_is_exactly_that_block_of_the_matrix():
    model, x, y = MLP.build()
    expected, _ = reference(model, cross_entropy, x, y)
    layout = it.hessian(model, cross_entropy, (x, y)).layout
    position = {name: np.arange(layout.n)[layout[name].indices] for name in layout}
    for selection, names in (
        ("2.weight", ["2.weight"]),
        ("2", ["2.weight", "2.bias"]),
        ("*.bias", ["0.bias", "2.bias", "4.bias"]),
        (model[4], ["4.weight", "4.bias"]),
        (["4.*", "0.bias"], ["0.bias", "4.weight", "4.bias"]),  # order of the model
        (model[0].weight, ["0.weight"]),
        (model, list(layout)),
    ):
        H = it.hessian(model, cross_entropy, (x, y), parameters=selection)
        rows = np.concatenate([position[name] for name in names])
        assert list(H.layout) == names
        assert_close(H.to_dense(), expected[rows][:, rows])
        assert torch.equal(
            it.to_array(model, selection),
            torch.cat([model.get_parameter(name).detach().reshape(-1) for name in names]),
        )


def test_frozen_parameters_are_left_out_or_refused_by_name():
    model, x, y = MLP.build()
    expected, _ = reference(model, cross_entropy, x, y)
    model[0].requires_grad_(False)
    H = it.hessian(model, cross_entropy, (x, y))
    assert_close(H.to_dense(), expected[36:, 36:])
    for selection in ("0.weight", model[0], ["2.*", "0.bias"]):
        with pytest.raises(ValueError, match="frozen"):
            it.hessian(model, cross_entropy, (x, y), parameters=selection)
    assert it.to_array(model, "*.bias").shape == (7,)
    with pytest.raises(ValueError, match=r"available: 0\.weight \(frozen\)"):
        it.hessian(model, cross_entropy, (x, y), parameters="nothing.*")
    for wrong, error in (
        ([], ValueError),
        (3, TypeError),
        ([3], TypeError),
        (nn.ReLU(), ValueError),
    ):
        with pytest.raises(error):
            it.hessian(model, cross_entropy, (x, y), parameters=wrong)
    with pytest.raises(ValueError, match="no trainable"):
        it.to_array(model.requires_grad_(False))


def test_tied_parameters_are_one_block_under_any_of_their_names():
    case = BY_NAME["tied"]
    model, x, y = case.build()
    whole = it.hessian(model, case.loss, (x, y))
    assert whole.layout.names == ("embedding.weight", "mix.weight", "mix.bias")
    H = it.hessian(model, case.loss, (x, y), parameters="head.weight")
    assert H.layout.names == ("embedding.weight",)
    assert_close(H.to_dense(), whole.to_dense()[:28, :28])


def test_mixed_parameters_and_hooks_are_named():
    model, x, y = MLP.build()
    model[4].float()
    with pytest.raises(TypeError, match=r"float32 \('4.weight'\)"):
        it.hessian(model, cross_entropy, (x, y))
    model[4].double()
    handle = model[0].weight.register_hook(lambda g: 0 * g)
    with pytest.raises(ValueError, match=r"0\.weight.*hook"):
        it.hessian(model, cross_entropy, (x, y))
    handle.remove()
    with pytest.raises(TypeError, match="Module"):
        it.hessian(lambda x: x, cross_entropy, (x, y))


def test_from_array_is_to_array_backwards():
    model, _, _ = MLP.build()
    for name, value in it.from_array(model, it.to_array(model)).items():
        assert torch.equal(value, model.get_parameter(name))
    with pytest.raises(ValueError, match="shape"):
        it.from_array(model, torch.zeros(3))


# ------------------------------------------------------------------------- what is left behind


def _snapshot(model):
    return (
        [m.training for m in model.modules()],
        [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [p.detach().clone() for p in model.parameters()],
        [b.clone() for b in model.buffers()],
        [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        torch.get_rng_state(),
    )


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


@pytest.mark.parametrize("cache", [True, False])
def test_the_model_is_left_exactly_as_found(cache):
    case = BY_NAME["cnn"]
    model, x, y = case.build()
    model.train()
    model[1].eval()  # a frozen normalisation in a model that is being trained
    model[0].bias.requires_grad_(False)
    case.loss(model(x), y).backward()
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    before = _snapshot(model)
    H = it.hessian(model, case.loss, loader, cache=cache)
    first = H @ torch.ones(H.shape[0], dtype=x.dtype)
    it.per_sample_gradients(model, case.loss, loader)
    assert _same(_snapshot(model), before)
    with torch.inference_mode():
        v = torch.ones(H.shape[0], dtype=x.dtype)
        assert_close(H @ v, first)
    with torch.no_grad():
        it.per_sample_gradients(model, case.loss, (x, y))
    with pytest.raises(ValueError, match="1 columns"):
        _fails(model, x, y)
    assert _same(_snapshot(model), before)


def _fails(model, x, y):
    def loss(output, target):
        raise ValueError("1 columns")

    it.hessian(model, loss, (x, y))


@pytest.mark.parametrize("small", [True, False])
def test_no_graph_outlives_the_operator(small, monkeypatch):
    model, x, y = MLP.build()
    if not small:
        monkeypatch.setattr(recorded, "_MAX_NODES", -1)
    H = it.hessian(model, cross_entropy, (x, y))
    v = torch.ones(H.shape[0], dtype=x.dtype)
    y1 = H @ v
    assert "graphs kept" in repr(H)
    assert not y1.requires_grad
    held = weakref.ref(H._kept[0])
    kept = H._kept[0]
    assert isinstance(kept, recorded.RecordedProducts if small else GradientGraph)
    gradient = weakref.ref(kept._tape.constants[0] if small else kept._gradient[0])
    twin = pickle.loads(pickle.dumps(H))
    assert_close(twin @ v, y1, 0.0)
    assert_close(copy.deepcopy(H) @ v, y1, 0.0)
    del H, kept
    gc.collect()
    assert held() is None
    assert gradient() is None


def test_training_mode_fixes_the_masks_of_one_operator():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    _, x, y = MLP.build()
    state = torch.get_rng_state()
    made = {}
    for keep in (True, False):
        H = it.hessian(model, cross_entropy, (x, y), training=True, keep_graph=keep, batch_size=3)
        made[keep] = H.to_dense()
        assert torch.equal(H.to_dense(), made[keep])
        assert "training mode" in repr(H)
    assert_close(made[True], made[False])
    other = it.hessian(model, cross_entropy, (x, y), training=True, batch_size=3, rng=7)
    assert not torch.allclose(other.to_dense(), made[True])
    assert torch.equal(torch.get_rng_state(), state)
    eval_mode = it.hessian(model, cross_entropy, (x, y))
    assert_close(eval_mode.to_dense(), reference(model, cross_entropy, x, y)[0])


def test_threads_do_not_corrupt_values():
    model, x, y = MLP.build()
    H = it.hessian(model, cross_entropy, (x, y), batch_size=3)
    other = it.hessian(model, cross_entropy, (x, y), parameters="*.bias", keep_graph=False)
    X = torch.randn(H.shape[0], 4, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    expected, small, rows = (
        H @ X,
        other @ X[:13],
        it.per_sample_gradients(model, cross_entropy, x, y),
    )
    bad: list[str] = []

    def work() -> None:
        try:
            for _ in range(15):
                assert_close(H @ X, expected)
                assert_close(other @ X[:13], small)
                G = it.per_sample_gradients(model, cross_entropy, x, y)
                assert_close(G.to_dense(), rows.to_dense())
        except BaseException as error:
            bad.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad


@pytest.mark.parametrize("keep_graph", [True, False])
def test_a_model_trained_meanwhile_is_noticed(keep_graph):
    model, x, y = MLP.build()
    H = it.hessian(model, cross_entropy, (x, y), keep_graph=keep_graph)
    v = torch.ones(H.shape[0], dtype=x.dtype)
    H @ v
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="have changed"):
        H @ v


# ---------------------------------------------------------------------------------------- data


def test_data_that_can_be_read_only_once_are_refused():
    model, x, y = MLP.build()
    for data in (iter([(x, y)]), ((a, b) for a, b in [(x, y)]), zip([x], [y], strict=True)):
        with pytest.raises(TypeError, match="only once"):
            it.hessian(model, cross_entropy, data)


def test_data_that_differ_between_passes_are_named():
    model, x, y = MLP.build()
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    with pytest.raises(RuntimeError, match="shuffle=False"):
        it.hessian(model, cross_entropy, loader, cache=False)

    class Changing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            shift = 1e-6 * (self.passes > self.change)
            yield x[:4], y[:4]
            yield x[4:] + shift, y[4:]

    data = Changing()
    data.change = 2
    H = it.hessian(model, cross_entropy, data, cache=False)
    with pytest.raises(RuntimeError, match="batch 1 differs"):
        H @ torch.ones(H.shape[0], dtype=x.dtype)

    class RunsDry:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([(x, y)] if self.passes == 1 else [])

    with pytest.raises(RuntimeError, match="0 batches where the first pass gave 1"):
        it.hessian(model, cross_entropy, RunsDry(), cache=False)


def test_an_iterable_that_fills_one_buffer_is_cached_right():
    model, x, y = MLP.build()

    class Buffered:
        def __iter__(self):
            buffer = torch.empty(1, 5, dtype=x.dtype)
            for i in range(7):
                buffer.copy_(x[i : i + 1])
                yield buffer, y[i : i + 1]

    H = it.hessian(model, cross_entropy, Buffered())
    assert_close(H.to_dense(), reference(model, cross_entropy, x, y)[0])


def test_cache_auto_streams_what_does_not_fit(monkeypatch):
    model, x, y = MLP.build()
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    monkeypatch.setattr("invhvp._backend.free_memory", lambda x: 4 * 200)
    H = it.hessian(model, cross_entropy, loader)
    assert "streamed, graphs recomputed" in repr(H)
    assert not isinstance(H, HasTerms)
    assert_close(H.to_dense(), reference(model, cross_entropy, x, y)[0])


def test_as_many_graphs_are_kept_as_fit(monkeypatch):
    model, x, y = MLP.build()
    H = it.hessian(model, cross_entropy, (x, y), batch_size=3)
    one = 3 * H._bytes_per_sample
    monkeypatch.setattr("invhvp._backend.free_memory", lambda x: int(2 * 2.2 * one))
    H = it.hessian(model, cross_entropy, (x, y), batch_size=3)
    assert "2 graphs kept" in repr(H)
    expected = reference(model, cross_entropy, x, y)[0]
    for _ in range(2):
        assert_close(H.to_dense(), expected)
    assert sorted(H._kept) == [0, 1]


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (None, TypeError, "missing"),
        (torch.zeros(7, 5), TypeError, "tuple"),
        (TensorDataset(torch.zeros(7, 5), torch.zeros(7)), TypeError, "DataLoader"),
        ([], ValueError, "no batches"),
        (3, TypeError, "iterable"),
        ([torch.zeros(7, 5)], TypeError, r"\(x, y\)"),
        ([(np.zeros((7, 5)), np.zeros(7))], TypeError, "as_tensor"),
        ((torch.zeros(7, 5).double(), torch.zeros(6).long()), ValueError, "one row a sample"),
        ({"x": torch.zeros(7, 5)}, TypeError, "batch_loss"),
    ],
)
def test_wrong_data(data, error, match):
    model, _, _ = MLP.build()
    with pytest.raises(error, match=match):
        it.hessian(model, cross_entropy, data)


def test_a_loader_of_a_list_of_tensors_and_mixed_devices_of_batches():
    model, x, y = MLP.build()
    loader = DataLoader([(x[i], y[i]) for i in range(7)], batch_size=4)
    H = it.hessian(model, cross_entropy, loader)
    assert_close(H.to_dense(), reference(model, cross_entropy, x, y)[0])


# ----------------------------------------------------------------------------- losses


def test_a_weighted_loss_is_refused_and_accepted_in_other_forms():
    model, x, y = MLP.build()
    weight = torch.tensor([1.0, 5.0, 0.2], dtype=x.dtype)
    weighted = nn.CrossEntropyLoss(weight=weight)
    order = torch.argsort(y)
    by_class = [(x[order[i : i + 1]], y[order[i : i + 1]]) for i in range(7)]
    for data in ((x, y), by_class):  # also where no batch has two samples, or two classes
        with pytest.raises(ValueError, match=r"class weights.*batch_loss="):
            it.hessian(model, weighted, data)
    rows = [reference(model, cross_entropy, x[i : i + 1], y[i : i + 1])[0] for i in range(7)]
    total = sum(float(weight[y[i]]) * rows[i] for i in range(7))
    summed = nn.CrossEntropyLoss(weight=weight, reduction="sum")
    single = nn.CrossEntropyLoss(weight=weight, reduction="none")
    count = float(weight[y].sum())
    for H in (
        it.hessian(model, summed, (x, y), reduction="sum", count=count, batch_size=3),
        it.hessian(model, single, (x, y), reduction="none", count=count, batch_size=3),
        it.hessian(
            model,
            batch_loss=lambda m, b: single(m(b[0]), b[1]),
            data=DataLoader(TensorDataset(x, y), batch_size=2),
            count=count,
        ),
    ):
        assert_close(H.to_dense(), total / count)
    plain = it.hessian(model, summed, (x, y), reduction="sum")
    assert_close(plain.to_dense(), total / 7)


def test_a_weighted_loss_is_refused_however_sure_the_model_is():
    model, x, _ = MLP.build(dtype=torch.float32)
    with torch.no_grad():
        model[4].weight.mul_(1e3)
    y = model(x).argmax(1)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]))
    y[:2] = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="class weights"):
        it.hessian(model, weighted, (x, y))
    it.hessian(model, cross_entropy, (x, model(x).argmax(1)))


def test_other_means_are_refused():
    model, x, y = MLP.build()
    ignoring = y.clone()
    ignoring[2] = -100
    with pytest.raises(ValueError, match="ignore_index"):
        it.hessian(model, cross_entropy, (x, ignoring))
    with pytest.raises(ValueError, match="is not the mean"):
        it.hessian(model, nn.CrossEntropyLoss(reduction="sum"), (x, y))
    with pytest.raises(ValueError, match="is not the sum"):
        it.hessian(model, cross_entropy, (x, y), reduction="sum")
    with pytest.raises(ValueError, match='reduction="none"'):
        it.hessian(model, nn.CrossEntropyLoss(reduction="none"), (x, y))
    with pytest.raises(ValueError, match="one loss a sample"):
        it.hessian(model, cross_entropy, (x, y), reduction="none")
    with pytest.raises(ValueError, match="takes"):
        it.hessian(model, cross_entropy, (x, y), reduction="median")
    with pytest.raises(ValueError, match="count="):
        it.hessian(model, cross_entropy, (x, y), count=3.0)
    with pytest.raises(ValueError, match="positive"):
        it.hessian(model, nn.CrossEntropyLoss(reduction="sum"), (x, y), reduction="sum", count=0.0)
    with pytest.raises(TypeError, match="either"):
        it.hessian(model, data=(x, y))
    with pytest.raises(TypeError, match="either"):
        it.hessian(model, cross_entropy, (x, y), batch_loss=lambda m, b: m(b[0]).sum(1))
    with pytest.raises(ValueError, match="one loss a sample"):
        it.hessian(model, batch_loss=lambda m, b: m(b[0]).sum(), data=(x, y))


def test_uniform_predictions_hide_no_weights():
    model, x, y = MLP.build()
    with torch.no_grad():
        model[4].weight.zero_()
        model[4].bias.zero_()
    y[:3] = torch.tensor([0, 1, 2])
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)
    with pytest.raises(ValueError, match="class weights"):
        it.hessian(model, nn.CrossEntropyLoss(weight=weight), (x, y))
    H = it.hessian(model, cross_entropy, (x, y))
    assert_close(H.to_dense(), reference(model, cross_entropy, x, y)[0])


def test_a_loss_that_vmap_cannot_follow():
    model, x, y = MLP.build()

    def loss(output, target):
        if float(output.detach().max()) > 1e9:
            raise AssertionError
        return cross_entropy(output, target)

    w = torch.linspace(0.5, 2, 7, dtype=x.dtype)
    H = it.hessian(model, loss, (x, y, w))
    assert_close(H.to_dense(), it.hessian(model, cross_entropy, (x, y, w)).to_dense())


def test_mappings_through_batch_loss():
    model, x, y = MLP.build()

    def losses(model, batch):
        return cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    batches = [{"x": x[:4], "y": y[:4]}, {"x": x[4:], "y": y[4:]}]
    expected, _ = reference(model, cross_entropy, x, y)
    for data in (batches, {"x": x, "y": y}):
        H = it.hessian(model, batch_loss=losses, data=data)
        assert_close(H.to_dense(), expected)
        assert isinstance(H, HasTerms)


def test_samples_that_depend_on_each_other_are_refused():
    model, x, y = BY_NAME["cnn"].build()
    with pytest.raises(ValueError, match=r"BatchNorm2d '1'.*training=False"):
        it.hessian(model, cross_entropy, (x, y), training=True)

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x):
            return self.layer(x - x.mean(0))

    model, (_, x, y) = Centred(), MLP.build()
    with pytest.raises(ValueError, match="depends on the other samples"):
        it.hessian(model, cross_entropy, (x, y))
    H = it.hessian(
        model,
        batch_loss=lambda m, b: cross_entropy(m(b[0]), b[1], reduction="none"),
        data=(x, y),
    )
    assert not isinstance(H, HasTerms)


# ------------------------------------------------------------------------------------- subsets


@pytest.mark.parametrize("weights", [False, True])
def test_subsets_are_means_over_the_chosen_samples(weights):
    model, x, y = MLP.build()
    w = torch.linspace(0.5, 2, 7, dtype=x.dtype) if weights else torch.ones(7, dtype=x.dtype)
    data = DataLoader(TensorDataset(x, y, w) if weights else TensorDataset(x, y), batch_size=3)
    H = it.hessian(model, cross_entropy, data)
    assert isinstance(H, HasTerms)
    assert H.n_terms == 7
    rows = [reference(model, cross_entropy, x[i : i + 1], y[i : i + 1])[0] for i in range(7)]
    for chosen in ([5, 0], [2], [1, 1, 6]):
        expected = sum(float(w[i]) * rows[i] for i in chosen) / len(chosen) * 7 / float(w.sum())
        for indices in (chosen, np.array(chosen), torch.tensor(chosen, dtype=torch.int32)):
            assert_close(H.subset(indices).to_dense(), expected)
    assert_close(H.subset(range(7)).to_dense(), H.to_dense())
    assert_close(H.subset([1, 2]).subset([1]).to_dense(), H.subset([2]).to_dense())
    with pytest.raises(IndexError):
        H.subset([7])
    with pytest.raises(ValueError, match="at least one"):
        H.subset([])
    with pytest.raises(TypeError, match="integers"):
        H.subset(torch.ones(2))


def test_ragged_batches_have_no_terms():
    case = BY_NAME["tied"]
    model, x, y = case.build()
    batches = [(x[:4], y[:4]), (x[4:, :2], y[4:])]
    H = it.hessian(model, case.loss, batches)
    assert not isinstance(H, HasTerms)
    expected = (
        4 * reference(model, case.loss, *batches[0])[0]
        + 3 * reference(model, case.loss, *batches[1])[0]
    ) / 7
    assert_close(H.to_dense(), expected)


# ------------------------------------------------------------------------------ second derivative


def test_an_operation_without_second_derivative_is_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x):
            return Once.apply(self.layer(x))

    _, x, y = MLP.build()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        it.hessian(Model(), cross_entropy, (x, y))


def test_a_wrong_second_derivative_is_noticed():
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)).double()
    _, x, y = MLP.build()
    v, g = torch.rand(3, 5, dtype=x.dtype), torch.rand(3, 1, dtype=x.dtype)
    inputs = (v.requires_grad_(), g.requires_grad_())
    if torch.autograd.gradgradcheck(torch._weight_norm, inputs, raise_exception=False):
        pytest.skip("this torch has repaired the second derivative of weight_norm")
    with pytest.raises(NotImplementedError, match="not symmetric"):
        it.hessian(normed, cross_entropy, (x, y))


def test_a_linear_model_with_a_linear_loss_has_no_curvature():
    model, (_, x, y) = nn.Linear(5, 3).double(), MLP.build()
    H = it.hessian(model, lambda o, t: o.sum(1).mean(), (x, y))
    assert torch.equal(H.to_dense(), torch.zeros(18, 18, dtype=x.dtype))


def test_an_unused_layer_has_zero_rows():
    _, x, y = MLP.build()
    H = it.hessian(Twice().double(), cross_entropy, (x, y), parameters="idle.*")
    assert torch.equal(H.to_dense(), torch.zeros(6, 6, dtype=x.dtype))


def test_the_door_is_the_operator_s():
    model, x, y = MLP.build()
    H = it.hessian(model, cross_entropy, (x, y))
    with pytest.raises(TypeError, match="float64"):
        H @ torch.ones(H.shape[0])
    with pytest.raises(TypeError, match="torch"):
        H @ np.ones(H.shape[0])
    with pytest.raises(ValueError, match="transpose"):
        H @ torch.ones(2, H.shape[0], dtype=x.dtype)
    v = torch.ones(H.shape[0], dtype=x.dtype, requires_grad=True)
    assert not (H @ v).requires_grad


# ------------------------------------------------------------------------------- the benchmark


def test_the_benchmark_compares_with_float64(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    from benchmarks import __main__ as command

    monkeypatch.delenv("INVHVP_PYDVL_PYTHON", raising=False)
    assert command.main(["hessian-products", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "hessian-products.json").read_text())["rows"]
    ours = [row for row in rows if row["method"] == "invhvp"]
    assert [row["k"] for row in ours] == [1, 4]
    assert all(row["relative_error"] < 1e-5 for row in ours)
    absent = [row for row in rows if row["method"].startswith("pyDVL")]
    assert all("INVHVP_PYDVL_PYTHON" in row["said"] for row in absent)
    assert all(row["seconds"] is None for row in absent)
    assert "÷ invhvp" in (tmp_path / "hessian-products.md").read_text()
