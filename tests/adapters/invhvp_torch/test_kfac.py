"""K-FAC and EKFAC of every kind of layer against dense float64 Fisher blocks."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import invhvp as ih
import invhvp_torch as it
from invhvp.estimate import block_errors
from invhvp.testing import check_operator
from invhvp_torch import seeds
from invhvp_torch.objective import Objective
from tests.adapters.invhvp_torch.kronecker_models import DEEP_LINEAR, MORE
from tests.adapters.invhvp_torch.models import (
    BY_NAME,
    CASES,
    assert_close,
    cross_entropy,
    reference,
)
from tests.adapters.invhvp_torch.references import gauss_newton_reference, weighted_mean

MLP, CNN, WORDS = BY_NAME["mlp"], BY_NAME["cnn"], MORE[1]


def projected(K, F: torch.Tensor) -> torch.Tensor:
    """F block by block; of Kronecker blocks the diagonal in the block's own eigenbasis."""
    out = torch.zeros_like(F)
    for name, A in K.blocks.items():
        where = torch.arange(F.shape[0])[K.layout[name].indices]
        block = F[where][:, where]
        if isinstance(A, ih.EigenKronecker):
            U, V = A.out_vectors, A.in_vectors
            V = torch.eye(A.block_shape[1], dtype=F.dtype) if V is None else V
            Q = torch.kron(U.contiguous(), V.contiguous()).to(F.dtype)
            block = (Q * torch.diagonal(Q.T @ block @ Q)) @ Q.T
        out[where[:, None], where] = block
    return out


def block(F: torch.Tensor, K, name: str) -> torch.Tensor:
    where = torch.arange(F.shape[0])[K.layout[name].indices]
    return F[where][:, where]


# ------------------------------------------------------------------------------ what is exact


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
def test_ekfac_is_the_exact_fisher_in_its_eigenbasis(case, sharing):
    model, x, y = case.build()
    size = case.whole or 3
    K = it.ekfac(model, case.loss, (x, y), batch_size=size, sharing=sharing)
    F = gauss_newton_reference(model, case.loss, x, y)
    assert_close(K.to_dense(), projected(K, F), 1e-10)
    assert K.trace_ratio() == pytest.approx(1.0, abs=1e-12)
    assert K.trace() == pytest.approx(float(F.trace()), rel=1e-10)
    K = it.ekfac(model, case.loss, (x, y), batch_size=size, sharing=sharing, fisher="empirical")
    _, G = reference(model, case.loss, x, y)
    assert_close(K.to_dense(), projected(K, G.T @ G / len(G)), 1e-10)


def test_every_layer_has_the_block_that_it_should():
    kinds = {}
    for case in (*CASES, *MORE):
        model, x, y = case.build()
        K = it.kfac(model, case.loss, (x, y), batch_size=case.whole or 3)
        kinds[case.name] = {
            name: A.block_shape if hasattr(A, "block_shape") else type(A).__name__
            for name, A in K.blocks.items()
        }
    assert kinds["mlp"] == {"0": (6, 6), "2": (4, 7), "4": (3, 5)}
    assert kinds["regression"] == {"0": (6, 6), "2.weight": (2, 6)}
    assert kinds["cnn"]["0"] == (3, 10)
    assert kinds["cnn"]["1.weight"] == kinds["cnn"]["1.bias"] == "Dense"
    assert kinds["attention"] == {
        "embedding.weight": (4, 7), "norm.weight": "Dense", "norm.bias": "Dense",
        "query": (12, 5), "attention.in_proj": (12, 5), "attention.out_proj": (4, 5),
        "head": (3, 5),
    }  # fmt: skip
    assert kinds["tied"] == {"embedding.weight": (7, 4), "mix": (4, 5)}
    assert kinds["twice"]["again"] == (5, 6)
    assert kinds["twice"]["shared.weight"] == "Dense"  # used by hand, too
    assert kinds["convolutions"] == {
        "0": (4, 7), "2[0]": (3, 7), "2[1]": (3, 7), "5.weight": (2, 6), "7": (3, 7),
    }  # fmt: skip
    assert kinds["words"]["head"] == (3, 5)
    assert kinds["words"]["attention.in_proj"] == (12, 5)
    assert kinds["words"]["scale"] == "Dense"
    assert kinds["repeated"]["again"] == (4, 5)


@pytest.mark.parametrize("build", [it.kfac, it.ekfac])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_deep_linear_network_with_squared_error_is_exact(build, dtype):
    model, x, y = DEEP_LINEAR.build(dtype=dtype)
    K = build(model, DEEP_LINEAR.loss, (x, y), batch_size=3)
    wide = copy.deepcopy(model).double()
    F = gauss_newton_reference(wide, DEEP_LINEAR.loss, x.double(), y.double())
    for name, A in K.blocks.items():
        assert_close(A.to_dense(), block(F, K, name), 1e-12 if dtype == torch.float64 else 1e-5)
    assert max(block_errors(K, it.gauss_newton(model, DEEP_LINEAR.loss, (x, y))).values()) < 1e-3


@pytest.mark.parametrize("build", [it.kfac, it.ekfac])
def test_one_sample_of_rank_one_is_exact(build):
    model, x, y = MLP.build(n=1)
    K = build(model, cross_entropy, (x, y), fisher="empirical")
    _, G = reference(model, cross_entropy, x, y)
    for name, A in K.blocks.items():
        assert_close(A.to_dense(), block(G.T @ G, K, name), 1e-11)


@pytest.mark.parametrize("T", [1, 12])
def test_one_loss_term_a_position_makes_expand_exact_for_a_linear_network(T):
    """No coupling of positions: S does not depend on the data, and A is what expand averages."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    x = torch.randn(6, T, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(6, T, 2, dtype=torch.float64)
    K = it.kfac(model, nn.MSELoss(), (x, y), batch_size=4)
    F = gauss_newton_reference(model, nn.MSELoss(), x, y)
    for name, A in K.blocks.items():
        assert_close(A.to_dense(), block(F, K, name), 1e-12)


@pytest.mark.parametrize("T", [1, 12])
def test_a_linear_layer_before_mean_pooling_makes_reduce_exact(T):
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).mean(1)

    model = Pooled().double()
    x = torch.randn(6, T, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(6, 3, dtype=torch.float64)
    K = it.kfac(model, nn.MSELoss(), (x, y), sharing="reduce")
    F = gauss_newton_reference(model, nn.MSELoss(), x, y)
    assert_close(K.to_dense()[:, :], _in_order(K, F), 1e-12)
    expand = it.kfac(model, nn.MSELoss(), (x, y))
    far = torch.linalg.norm(expand.to_dense() - F) / torch.linalg.norm(F)
    assert far < 1e-12 if T == 1 else far > 0.1


def _in_order(K, F: torch.Tensor) -> torch.Tensor:
    assert len(K.blocks) == 1
    return F


def test_kfac_equals_the_textbook_formula():
    model, x, y = BY_NAME["tokens"].build()
    K = it.kfac(model, BY_NAME["tokens"].loss, (x, y), fisher="empirical", batch_size=2)
    inputs, grads = [], []
    layer = model[0]
    for i in range(len(x)):
        seen = []
        handle = layer.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        loss = BY_NAME["tokens"].loss(model(x[i : i + 1]), y[i : i + 1])
        handle.remove()
        grads.append(torch.autograd.grad(loss, seen[0])[0][0])
        inputs.append(torch.cat([x[i], torch.ones(4, 1, dtype=x.dtype)], 1))
    d, a = torch.cat(grads), torch.cat(inputs)
    N, T = len(x), 4
    assert_close(K.blocks["0"].to_dense(), T * torch.kron(d.T @ d, a.T @ a) / (N * T) ** 2, 1e-12)


# -------------------------------------------------------------------- which Fisher it is about


def test_uniform_predictions_have_a_fisher_matrix():
    """Where all classes are equally likely a surrogate gradient can vanish; F does not."""
    model, x, y = MLP.build()
    with torch.no_grad():
        model[4].weight.zero_()
        model[4].bias.zero_()
    F = gauss_newton_reference(model, cross_entropy, x, y)
    exact = it.ekfac(model, cross_entropy, (x, y))
    assert_close(exact.to_dense(), projected(exact, F), 1e-12)
    assert float(exact.trace()) == pytest.approx(float(F.trace()))
    # (I − 11ᵀ/C)/C has the trace (C − 1)/C, times the mean of |a|².
    for fisher in ("mc", "sign"):
        K = it.ekfac(model, cross_entropy, (x, y), fisher=fisher, samples=200)
        assert K.trace() == pytest.approx(float(F.trace()), rel=0.2)


@pytest.mark.parametrize("source", [seeds.OfSigns, seeds.OfSampledFisher])
@pytest.mark.parametrize("name", ["mlp", "regression", "places", "events", "other"])
def test_drawn_seeds_have_the_output_hessian_as_second_moment(name, source):
    """The mean of r rᵀ over 20 000 draws, entry by entry within five standard errors."""
    rng = torch.Generator().manual_seed(0)
    loss, shape = {
        "mlp": (cross_entropy, (3, 4)),
        "regression": (nn.MSELoss(), (3, 2)),
        "places": (cross_entropy, (3, 2, 3)),
        "events": (nn.BCEWithLogitsLoss(), (3, 2)),
        "other": (nn.HuberLoss(delta=10.0), (3, 2)),
    }[name]
    if name == "other" and source is seeds.OfSampledFisher:
        pytest.skip("a likelihood that is not known")
    output = torch.randn(shape, generator=rng, dtype=torch.float64)
    target = torch.rand(shape, generator=rng, dtype=torch.float64)
    if loss is cross_entropy:
        target = torch.randint(0, 2, (shape[0], *shape[2:]), generator=rng)
    model = nn.Identity()
    objective = Objective(model=model, loss=loss, batch_loss=None)
    forward = objective.forward((output, target))
    exact = seeds.of_gauss_newton(forward, 0).vectors
    assert exact is not None
    count = 20_000
    drawn = source(count, 5)(forward, 0).vectors * math.sqrt(count)
    for row, root in zip(drawn, exact, strict=True):
        moments = row[:, :, None] * row[:, None, :]
        error = (moments.mean(0) - root.T @ root).abs()
        assert bool((error <= 5 * moments.std(0) / math.sqrt(count) + 1e-12).all())
    again = source(count, 5)(forward, 0).vectors * math.sqrt(count)
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, source(count, 5)(forward, 1).vectors * math.sqrt(count))


def test_signs_of_one_column_change_nothing():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.ones(6, 1, dtype=torch.float64)
    for loss in (nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.SoftMarginLoss()):
        exact = it.ekfac(model, loss, (x, y))
        signs = it.ekfac(model, loss, (x, y), fisher="sign", rng=3)
        assert_close(signs.to_dense(), exact.to_dense(), 1e-12)


def test_sample_weights_and_count():
    model, x, y = MLP.build()
    w = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w[2] = 0.0
    K = it.ekfac(model, cross_entropy, (x, y, w), batch_size=3)
    F = weighted_mean(model, cross_entropy, x, y, w)
    assert_close(K.to_dense(), projected(K, F), 1e-11)
    keep = [0, 1, 3, 4, 5, 6]
    without = it.kfac(model, cross_entropy, (x[keep], y[keep], w[keep]))
    assert_close(it.kfac(model, cross_entropy, (x, y, w)).to_dense(), without.to_dense(), 1e-12)
    total = it.ekfac(model, nn.CrossEntropyLoss(reduction="sum"), (x, y), reduction="sum", count=1)
    mean = it.ekfac(model, cross_entropy, (x, y))
    assert_close(total.to_dense(), 7 * mean.to_dense(), 1e-12)


def test_padding_changes_nothing():
    case = BY_NAME["attention"]
    model, x, y = case.build()

    def batch_loss(model, batch):
        x, y, keep = batch
        h = model.embedding(x)
        h = torch.tanh(model.query(h)) * keep[:, :, None]
        return cross_entropy(h.sum(1)[:, :3], y, reduction="none")

    names = ["embedding", "query"]
    keep = torch.ones(7, 4, dtype=torch.float64)
    long_x = torch.cat([x, torch.full((7, 3), 5)], 1)
    long_keep = torch.cat([keep, torch.zeros(7, 3, dtype=torch.float64)], 1)
    for build in (it.kfac, it.ekfac):
        options = {"batch_loss": batch_loss, "fisher": "empirical", "parameters": names}
        short = build(model, data=[(x, y, keep)], **options)
        long = build(model, data=[(long_x, y, long_keep)], **options)
        assert_close(long.to_dense(), short.to_dense(), 1e-11)


# -------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("build", [it.kfac, it.ekfac])
@pytest.mark.parametrize("case", [MLP, CNN, WORDS], ids=lambda case: case.name)
def test_batches_and_their_order_change_nothing(case, build):
    model, x, y = case.build()
    whole = build(model, case.loss, (x, y)).to_dense()
    for size in (1, 3):
        assert_close(build(model, case.loss, (x, y), batch_size=size).to_dense(), whole, 1e-10)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert_close(build(model, case.loss, (x[order], y[order])).to_dense(), whole, 1e-10)


@pytest.mark.parametrize("case", [MLP, CNN, WORDS], ids=lambda case: case.name)
def test_memory_changes_the_passes_and_nothing_else(case):
    model, x, y = case.build()
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    found, forwards = [], []
    for memory in (None, 0):
        seen.clear()
        K = it.ekfac(model, case.loss, (x, y), batch_size=2, memory=memory)
        found.append(K.to_dense())
        forwards.append(len(seen))
    handle.remove()
    assert forwards[0] < forwards[1]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("case", [MLP, CNN], ids=lambda case: case.name)
def test_single_precision(case):
    model, x, y = case.build()
    wide = it.ekfac(model, case.loss, (x, y))
    narrow_model = copy.deepcopy(model).float()
    narrow = it.ekfac(narrow_model, case.loss, (x.float(), y))
    assert narrow.dtype == torch.float32
    assert_close(narrow.to_dense(), wide.to_dense(), 1e-4)
    check_operator(narrow)


def test_half_precision_accumulates_in_single():
    model, x, y = MLP.build(n=200)
    wide = it.ekfac(model, cross_entropy, (x, y))
    half = it.ekfac(copy.deepcopy(model).bfloat16(), cross_entropy, (x.bfloat16(), y))
    assert half.dtype == torch.bfloat16
    assert half.blocks["0"].out_vectors.dtype == torch.float32
    assert half.trace() == pytest.approx(wide.trace(), rel=0.05)
    factored = it.kfac(copy.deepcopy(model).bfloat16(), cross_entropy, (x.bfloat16(), y))
    assert factored.blocks["0"].S.dtype == torch.float32
    ones = torch.ones(79, dtype=torch.bfloat16)
    for K in (half, factored):
        assert (K @ ones).dtype == K.diagonal().dtype == torch.bfloat16
        assert (ih.Direct().prepare(K, damping=0.1) @ ones).dtype == torch.bfloat16


def test_a_forward_pass_under_autocast():
    class Mixed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x).float()

    model, x, y = MLP.build(n=50, dtype=torch.float32)
    exact = it.ekfac(model, cross_entropy, (x, y))
    mixed = it.ekfac(Mixed(model), cross_entropy, (x, y))
    assert mixed.dtype == torch.float32
    assert [type(A).__name__ for A in mixed.blocks.values()] == ["EigenKronecker"] * 3
    assert mixed.trace() == pytest.approx(exact.trace(), rel=0.02)


def test_the_model_is_left_as_it_was():
    model, x, y = CNN.build()
    model.train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    it.ekfac(model, CNN.loss, (x, y), fisher="sign")
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# ------------------------------------------------------------------------------------ its use


def test_as_inverse_as_power_and_by_block():
    model, x, y = MLP.build()
    K = it.ekfac(model, cross_entropy, (x, y))
    check_operator(K)
    M, eye = K.to_dense(), torch.eye(79, dtype=torch.float64)
    inverse = ih.Direct().prepare(K, damping=0.1)
    assert_close(inverse @ eye, torch.linalg.inv(M + 0.1 * eye), 1e-10)
    assert_close(inverse.with_damping(1.0) @ eye, torch.linalg.inv(M + eye), 1e-10)
    half = inverse.power(-0.5)
    assert_close(half @ (half @ eye), inverse @ eye, 1e-10)
    damping = K.relative_damping(0.1)
    assert set(damping) == {"0", "2", "4"}
    mean = float(torch.trace(K.blocks["2"].to_dense())) / 28
    assert damping["2"] == pytest.approx(0.1 * mean)
    shift = torch.from_numpy(K.layout.shifts(damping))
    expected = torch.linalg.inv(M + torch.diag(shift))
    assert_close(ih.Direct().prepare(K, damping=damping) @ eye, expected, 1e-10)


def test_as_preconditioner():
    """Badly scaled inputs: what the factor A repairs."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, dtype=torch.float64, generator=rng) * torch.logspace(1, -1.5, 12)
    y = torch.randint(0, 3, (300,), generator=rng)
    model = nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=rng))
    K = it.ekfac(model, cross_entropy, (x, y))
    B = torch.randn(K.shape[0], 4, dtype=torch.float64, generator=rng)
    A = it.gauss_newton(model, cross_entropy, (x, y))
    options = {"rtol": 1e-6}
    helped = ih.BlockCG(preconditioner=ih.Surrogate(K), **options)
    plain = ih.solve(A, B, ih.BlockCG(**options), damping=1e-4)
    found = ih.solve(A, B, helped, damping=1e-4)
    assert {status.name for status in (*found.status, *plain.status)} == {"CONVERGED"}
    assert found.passes < plain.passes
    M, eye = A.to_dense(), torch.eye(K.shape[0], dtype=torch.float64)
    residual = B - (M + 1e-4 * eye) @ found.x
    assert bool((residual.norm(dim=0) <= 1.01e-6 * B.norm(dim=0)).all())
    astra = ih.LiSSA(preconditioner=ih.Surrogate(K), rtol=1e-3, variance_reduction="svrg")
    solved = ih.solve(A, B, astra, damping=1e-2)
    assert {status.name for status in solved.status} == {"CONVERGED"}
    residual = B - (M + 1e-2 * eye) @ solved.x
    assert bool((residual.norm(dim=0) <= 1.01e-3 * B.norm(dim=0)).all())
    bare = ih.solve(A, B, ih.LiSSA(rtol=1e-3, variance_reduction="svrg"), damping=1e-2)
    assert solved.products < bare.products


def test_other_arrays():
    model, x, y = WORDS.build()
    torch_K = it.ekfac(model, cross_entropy, (x, y))
    K = it.ekfac(model, cross_entropy, (x, y), array_namespace=np)
    b = np.linspace(-1.0, 1.0, K.shape[0])
    found = ih.Direct().prepare(K, damping=0.1) @ b
    assert isinstance(found, np.ndarray)
    expected = ih.Direct().prepare(torch_K, damping=0.1) @ torch.from_numpy(b)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-10, atol=1e-12)
    with pytest.raises(TypeError, match="array_namespace=numpy"):
        torch_K @ b


# ---------------------------------------------------------------------------------- the doors


def test_nan_names_the_layer():
    model, x, y = MLP.build()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layer '\d' contains NaN or Inf"):
        it.ekfac(model, cross_entropy, (x, y))


def test_wrong_options_are_named(tmp_path):
    model, x, y = MLP.build()
    for options, said in (
        ({"fisher": "true"}, "fisher= takes one of 'exact', 'mc', 'sign', 'empirical'"),
        ({"samples": 0}, "samples must be an integer of at least 1"),
        ({"sharing": "mean"}, 'sharing= takes "expand" or "reduce"'),
        ({"memory": -1}, "memory must be a number of bytes"),
        ({"checkpoint": tmp_path / "no" / "file"}, "folder of checkpoint="),
        ({"checkpoint": tmp_path / "file", "checkpoint_every": 0}, "checkpoint_every must be"),
    ):
        with pytest.raises(ValueError, match=said):
            it.ekfac(model, cross_entropy, (x, y), **options)
    with pytest.raises(ValueError, match="likelihood"):
        it.ekfac(model, lambda o, t: o.logsumexp(1).mean(), (x, y), fisher="mc")


def test_progress_shows_a_bar(capsys):
    model, x, y = MLP.build()
    it.ekfac(model, cross_entropy, (x, y), batch_size=2, progress=True)
    assert "EKFAC" in capsys.readouterr().err


class Experts(nn.Module):
    """Each sample goes to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4)])
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            rows = ((x[:, 0] > 0).long() == i).nonzero()[:, 0]
            if len(rows):
                h = h.index_add(0, rows, torch.tanh(expert(x[rows])))
        return self.out(h)


class Pairs(nn.Module):
    """Layers are called on two samples at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return torch.cat([self.out(torch.tanh(self.inner(part))) for part in x.split(2)])


@pytest.mark.parametrize("build", [Experts, Pairs])
@pytest.mark.parametrize("fit", [it.kfac, it.ekfac])
def test_layers_on_some_of_the_samples_get_exact_blocks(build, fit):
    torch.manual_seed(0)  # the two samples of the probe go to the same expert
    model = build().double()
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
    K = fit(model, cross_entropy, (x, y), fisher="empirical")
    rows = it.per_sample_gradients(model, cross_entropy, x, y).to_dense()
    F = rows.T @ rows / 8
    dense = [name for name, A in K.blocks.items() if isinstance(A, ih.Dense)]
    assert len(dense) == 4
    for name in dense:
        assert_close(K.blocks[name].to_dense(), block(F, K, name))
    assert "out" in K.blocks or build is Pairs
    if fit is it.ekfac:
        assert_close(torch.tensor(K.trace()), torch.tensor(float(F.trace())))
