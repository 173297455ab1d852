"""What each storable class is made of. A new one is a `register` line here."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from .. import gradients, operators
from ..estimate import DiagonalEstimate, Sketch
from ..estimate.lanczos import Eigenpairs
from ..estimate.nystroem import Model
from ..layout import Block, Layout
from ..methods._harmonic_mean import HarmonicMean, LayerHarmonicMean
from ..operators.curvature_blocks import CurvatureBlocks, _Aliased
from ..operators.dense import DenseInverse
from ..operators.factor import SymmetricFactor
from ..operators.low_rank import LowRankInverse, WoodburyInverse
from ..operators.pseudo_inverse import PseudoInverse, Truncation
from ..operators.rank_one_mean import (
    Congruence,
    GradientForm,
    ParameterSpaceInverse,
    SampleSpaceInverse,
)
from ._codec import Host, Small, register

# ------------------------------------------------------------------------- names of parameters


def _pack_layout(layout: Layout) -> dict[str, Any]:
    blocks = {}
    for name, block in layout.items():
        at = block.indices
        blocks[name] = [
            list(block.shape),
            [at.start, at.stop] if isinstance(at, slice) else Host(np.asarray(at, np.int64)),
        ]
    return {"blocks": blocks}


def _layout(blocks: dict[str, Any]) -> Layout:
    made = {}
    for name, (shape, at) in blocks.items():
        made[name] = Block(tuple(shape), slice(*at) if isinstance(at, list) else at)
    return Layout(made)


def _pack_aliased(layout: _Aliased) -> dict[str, Any]:
    return {**_pack_layout(layout), "parameters": layout._parameters}


def _aliased(blocks: dict[str, Any], parameters: dict[str, list[str]]) -> _Aliased:
    names = {block: tuple(inside) for block, inside in parameters.items()}
    return _Aliased(_layout(blocks), names)


register(Layout, _pack_layout, _layout)
register(_Aliased, _pack_aliased, _aliased)

# ----------------------------------------------------------------------------------- gradients

register(gradients.DenseGradients, lambda G: {"rows": G._rows, "layout": G.layout})
register(
    gradients.OuterProductGradients,
    lambda G: {"output_grads": G.output_grads, "inputs": G.distinct_inputs, "layout": G.layout},
)
register(
    gradients.EmbeddingGradients,
    lambda G: {
        "output_grads": G.output_grads,
        "indices": G.indices,
        "n_rows": G.block_shape[0],
        "layout": G.layout,
    },
)
register(gradients.StackedGradients, lambda G: {"blocks": dict(G.blocks), "layout": G._positions})

# ----------------------------------------------------------------------------------- operators


def _pack_diagonal(A: operators.Diagonal) -> dict[str, Any]:
    return {"d": A.diagonal(), "psd": A.psd, "layout": A.layout}


def _dense(**made: Any) -> operators.Dense:
    return operators.Dense(**made, check=False)


register(operators.Diagonal, _pack_diagonal)
register(operators.Identity, _pack_diagonal, operators.Diagonal)
register(operators.Dense, lambda A: {"M": A.to_dense(), "psd": A.psd, "layout": A.layout}, _dense)
register(
    operators.LowRank,
    lambda A: {"vectors": A.vectors, "values": Small(A._s), "layout": A.layout},
)
register(operators.BlockDiagonal, lambda A: {"blocks": A.blocks, "layout": A._index_sets})
register(operators.RankOneMean, lambda A: {"gradients": A.gradients, "count": A.count})


def _pack_eigen_kronecker(A: operators.EigenKronecker) -> dict[str, Any]:
    return {
        "out_vectors": A.out_vectors,
        "in_vectors": A.in_vectors,
        "eigenvalues": A.eigenvalues,
        "layout": A.layout,
        "like": A.like,
    }


def _pack_kronecker(A: operators.Kronecker) -> dict[str, Any]:
    eigen = vars(A).get("eigen")  # computed once for all λ, if it was
    return {"S": A.S, "A": A.A, "scale": A.scale, "layout": A.layout, "eigen": eigen}


def _kronecker(eigen: Any, **made: Any) -> operators.Kronecker:
    K = operators.Kronecker(**made)
    if eigen is not None:
        vars(K)["eigen"] = eigen
    return K


def _pack_curvature_blocks(A: CurvatureBlocks) -> dict[str, Any]:
    return {
        "blocks": A.blocks,
        "layout": A._index_sets,
        "name": A._name,
        "traces": A.exact_traces,
        "said": A._said,
    }


register(CurvatureBlocks, _pack_curvature_blocks)
register(operators.EigenKronecker, _pack_eigen_kronecker)
register(operators.Kronecker, _pack_kronecker, _kronecker)

# ------------------------------------------------------------------------------------ inverses
#
# What was factored is restored as it is: the constructors would factor again.


def _restored(kind: type, made: dict[str, Any]) -> Any:
    new = object.__new__(kind)
    for name, value in made.items():
        setattr(new, name, value)
    return new


def _pack_factor(factor: SymmetricFactor) -> dict[str, Any]:
    pairs = factor._eigen
    return {
        "L": Small(factor._L),
        "eigen": None if pairs is None else [Small(pairs[0]), Small(pairs[1])],
        "definite": factor.definite,
    }


def _factor(L: Any, eigen: Any, definite: bool) -> SymmetricFactor:
    made = {"_L": L, "_eigen": None if eigen is None else tuple(eigen), "definite": definite}
    return _restored(SymmetricFactor, made)


def _pack_base(A: operators.LinearOperator) -> dict[str, Any]:
    return {"n": A.shape[0], "like": A.like, "psd": A.psd, "layout": A.layout}


def _pack_dense_inverse(A: DenseInverse) -> dict[str, Any]:
    return {"factor": A._factor, **_pack_base(A)}


def _dense_inverse(factor: SymmetricFactor, n: int, **base: Any) -> DenseInverse:
    inverse = _restored(DenseInverse, {"_factor": factor})
    operators.LinearOperator.__init__(inverse, n, **base)
    return inverse


def _pack_woodbury(A: WoodburyInverse) -> dict[str, Any]:
    made = {"d": A._d, "F": A._F, "middle": Small(A._middle), "definite": A.definite}
    return {**made, **_pack_base(A)}


def _woodbury(d: Any, F: Any, middle: Any, definite: bool, n: int, **base: Any) -> WoodburyInverse:
    made = {"_d": d, "_F": F, "_middle": middle, "definite": definite}
    inverse = _restored(WoodburyInverse, made)
    operators.LinearOperator.__init__(inverse, n, **base)
    return inverse


def _pack_gradient_form(A: GradientForm) -> dict[str, Any]:
    return {"G": A._gradients, "alpha": A._alpha, "C": Small(A._C)}


def _gradient_form(G: gradients.GradientMatrix, alpha: float, C: Any) -> GradientForm:
    return GradientForm(operators.RankOneMean(G), alpha, C)


def _pack_harmonic_mean(A: HarmonicMean) -> dict[str, Any]:
    return {"G": A._G, "shift": A._shift, "count": A._count, "norms": A._norms}


def _pack_layer_harmonic_mean(A: LayerHarmonicMean) -> dict[str, Any]:
    return {
        "G": A._G,
        "layout": A._index_sets,
        "shifts": A._shifts,
        "count": A._count,
        "norms": A._norms,
    }


register(SymmetricFactor, _pack_factor, _factor)
register(DenseInverse, _pack_dense_inverse, _dense_inverse)
register(ParameterSpaceInverse, _pack_dense_inverse, _dense_inverse)
register(WoodburyInverse, _pack_woodbury, _woodbury)
register(LowRankInverse, lambda A: {"A": A._A, "shift": A._shift})
register(
    SampleSpaceInverse,
    lambda A: {"A": A.operator, "shift": A.shift, "gram": Small(A._gram)},
)
register(GradientForm, _pack_gradient_form, _gradient_form)
register(
    PseudoInverse,
    lambda A: {"inner": A.inner, "truncation": A.truncation},
    lambda inner, truncation: PseudoInverse(inner, Truncation(*truncation)),
)
register(Congruence, lambda A: {"K": A._K, "d": A._d[:, 0]})
register(HarmonicMean, _pack_harmonic_mean)
register(LayerHarmonicMean, _pack_layer_harmonic_mean)

# -------------------------------------------------------------- what serves another damping too


def _pack_fields(state: Any) -> dict[str, Any]:
    made = {field.name: getattr(state, field.name) for field in fields(state)}
    host = {k: Host(v) for k, v in made.items() if k in ("values", "residuals", "converged")}
    return made | host


def _pack_sketch(sketch: Sketch) -> dict[str, Any]:
    return {
        "n": sketch.n,
        "kind": sketch.kind,
        "products": sketch.products,
        "passes": sketch.passes,
        "asymmetry": sketch.asymmetry,
        "size": sketch.size,
        "test": sketch.test,
        "image": sketch.image,
        "gram": Host(sketch._gram),
        "gram_vectors": Host(sketch._gram_vectors),
        "models": [[key, model] for key, model in sketch._models.items()],
        "lowest": sketch._lowest,
        "norm": sketch._norm,
        "eps": sketch._eps,
    }


def _sketch(models: list[Any], **made: Any) -> Sketch:
    """A sketch that serves every λ but cannot grow; the caller gives it its operator."""
    hidden = {f"_{name}": made.pop(name) for name in ("gram", "gram_vectors", "norm", "eps")}
    hidden |= {"_lowest": made.pop("lowest"), "_models": dict(models)}
    return _restored(Sketch, {**made, **hidden, "_random": None, "_order": None})


register(Eigenpairs, _pack_fields)
register(Model, _pack_fields)
register(DiagonalEstimate, lambda d: {f.name: getattr(d, f.name) for f in fields(d)})
register(Sketch, _pack_sketch, _sketch)
