"""Torch inside, NumPy or CuPy outside: arrays change hands without copies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from invhvp import _backend
from invhvp.gradients import (
    DenseGradients,
    EmbeddingGradients,
    GradientMatrix,
    OuterProductGradients,
    StackedGradients,
)
from invhvp.operators import LinearOperator


class Bridge:
    """Hands arrays over to another library and back.

    Args:
        namespace: `numpy` or `cupy`.
        like: a tensor of the dtype and device of the model.
        transfer: allow copies between a GPU and NumPy.

    Raises TypeError where the library cannot hold such tensors without a copy.
    """

    def __init__(self, namespace: Any, like: torch.Tensor, *, transfer: bool) -> None:
        self.name = getattr(namespace, "__name__", str(namespace)).removeprefix("array_api_compat.")
        self._device = like.device
        if self.name not in ("numpy", "cupy"):
            msg = f"array_namespace= takes the modules numpy and cupy, got {self.name}"
            raise TypeError(msg)
        if _backend.dtype_name(like.dtype) == "bfloat16":
            msg = f"{self.name} has no bfloat16; convert the model to float32: model.float()"
            raise TypeError(msg)
        if self.name == "cupy" and self._device.type != "cuda":
            msg = (
                f"CuPy arrays live on a GPU, the model on {self._device}: move it, "
                'model.to("cuda"), or use array_namespace=numpy'
            )
            raise TypeError(msg)
        if self.name == "numpy" and self._device.type != "cpu" and not transfer:
            msg = (
                f"the model is on {self._device}, so that NumPy arrays would be copied at every "
                "product: pass transfer=True to accept that, or array_namespace=cupy"
            )
            raise TypeError(msg)
        self._namespace = namespace

    def to_torch(self, X: Any) -> torch.Tensor:
        """A tensor that shares the memory of X; a copy on the model's device for NumPy there."""
        if self.name == "cupy":
            return torch.from_dlpack(X)
        if any(step < 0 for step in X.strides):
            X = X.copy()  # torch has no negative strides
        elif not X.flags.writeable:
            # Nothing here writes to what it is given, but torch warns about memory that is
            # read-only: the view is of the same bytes.
            X = np.lib.stride_tricks.as_strided(np.asarray(_Writable(X)), X.shape, X.strides)
        return torch.from_numpy(X).to(self._device)

    def from_torch(self, t: torch.Tensor) -> Any:
        """An array that shares the memory of a tensor; a copy for NumPy from a GPU."""
        t = t.detach()
        return t.cpu().numpy() if self.name == "numpy" else self._namespace.from_dlpack(t)

    def stream(self) -> AbstractContextManager[Any]:
        """Torch on the stream that CuPy's caller is on: memory of both is freed in its order."""
        if self.name != "cupy":
            return nullcontext()
        pointer = self._namespace.cuda.get_current_stream().ptr
        if pointer == torch.cuda.current_stream(self._device).cuda_stream:
            return nullcontext()
        theirs = torch.cuda.ExternalStream(pointer, device=self._device)
        theirs.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(theirs)

    def product(self, matmat: Callable[[torch.Tensor], torch.Tensor], X: Any) -> Any:
        """A product of torch with an array of the other library."""
        with self.stream():
            return self.from_torch(matmat(self.to_torch(X)))

    def gradients(self, G: GradientMatrix) -> GradientMatrix:
        """A gradient matrix with the same structure, on views of the same memory."""
        if isinstance(G, StackedGradients):
            blocks = {name: self.gradients(block) for name, block in G.blocks.items()}
            return StackedGradients(blocks, layout=G.layout)
        if isinstance(G, OuterProductGradients):
            d, a = self.from_torch(G.output_grads), self.from_torch(G.distinct_inputs)
            return OuterProductGradients(output_grads=d, inputs=a, layout=G.layout)
        if isinstance(G, EmbeddingGradients):
            d, indices = self.from_torch(G.output_grads), self.from_torch(G.indices)
            return EmbeddingGradients(
                output_grads=d, indices=indices, n_rows=G.block_shape[0], layout=G.layout
            )
        return DenseGradients(self.from_torch(G.to_dense()), layout=G.layout)

    def operator(self, A: LinearOperator) -> Bridged:
        """A torch operator that takes and gives arrays of the other library."""
        return (BridgedTerms if hasattr(A, "subset") else Bridged)(A, self)


class Bridged(LinearOperator):
    """A torch operator in another library's arrays; one hand-over each way a product."""

    def __init__(self, operator: LinearOperator, bridge: Bridge) -> None:
        like = bridge.from_torch(operator.like)
        super().__init__(operator.shape[0], like=like, psd=operator.psd, layout=operator.layout)
        self.operator = operator
        self._bridge = bridge

    def _matmat(self, X: Any, /) -> Any:
        return self._bridge.product(self.operator._matmat, X)

    def check_operand(self, X: Any, what: str) -> None:
        """Raise TypeError or ValueError unless `X` can be multiplied with."""
        if isinstance(X, torch.Tensor):
            msg = (
                f"{what} was built with array_namespace={self._bridge.name} and takes its arrays, "
                "got a torch tensor; use .operator, the same on torch tensors"
            )
            raise TypeError(msg)
        super().check_operand(X, what)

    def __repr__(self) -> str:
        return f"{self.operator!r} in {self._bridge.name} arrays"


class BridgedTerms(Bridged):
    """Of an operator that can restrict itself to some of its samples."""

    operator: Any

    @property
    def n_terms(self) -> int:
        """Number of samples."""
        return self.operator.n_terms

    def subset(self, indices: Any, /) -> Bridged:
        """The mean over some samples; `indices` are integers (m,) of any library."""
        if not isinstance(indices, np.ndarray | torch.Tensor) and hasattr(indices, "get"):
            indices = indices.get()
        return Bridged(self.operator.subset(indices), self._bridge)


def bridge_to(namespace: Any, like: torch.Tensor, *, transfer: bool) -> Bridge | None:
    """The bridge that `array_namespace=` asks for; None for torch itself."""
    if namespace is None or namespace is torch:
        if transfer:
            raise ValueError("transfer= goes with array_namespace=numpy and a model on a GPU")
        return None
    return Bridge(namespace, like, transfer=transfer)


class TorchDoor(LinearOperator):
    """An operator on torch tensors that says what to write where it is given other arrays."""

    def check_operand(self, X: Any, what: str) -> None:
        """Raise TypeError or ValueError unless `X` can be multiplied with."""
        mine = isinstance(self._like, torch.Tensor)
        if mine and not isinstance(X, torch.Tensor) and _backend.is_array(X):
            theirs = _backend.library_name(X)
            msg = (
                f"{what} works on torch tensors, got a {theirs} array; build the operator with "
                f"array_namespace={theirs}, or pass torch.from_dlpack(x)"
            )
            raise TypeError(msg)
        super().check_operand(X, what)


class _Writable:
    """The memory of a read-only array without its flag."""

    def __init__(self, X: np.ndarray) -> None:
        self._owner = X
        self.__array_interface__ = {
            **X.__array_interface__,
            "data": (X.__array_interface__["data"][0], False),
        }
