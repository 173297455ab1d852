"""The loss of every sample, and the proof that a batch's loss is made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch

from invhvp import _backend

from . import samples
from .evaluation import quiet_vmap
from .heap import keep_freed_blocks
from .observed import Observed

Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]
BatchLoss: TypeAlias = Callable[[torch.nn.Module, Any], torch.Tensor]
Reduction: TypeAlias = Literal["mean", "sum", "none"]


@dataclass(kw_only=True)
class Objective:
    """What is differentiated: ℓ_i, the loss of sample i alone, weighted by its sample weight.

    Args:
        loss: loss(output, target), reduced over the batch as `reduction` says.
        batch_loss: instead of `loss`, f(model, batch) → per-sample losses (N,).
        reduction: "mean", "sum" or "none" (per-sample losses (N,)), what `loss` does.
        observed: whether to note what the model gave out within `batch_loss`.
    """

    model: torch.nn.Module
    loss: Loss | None
    batch_loss: BatchLoss | None
    reduction: Reduction = "mean"
    observed: bool = False
    _vmap: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        keep_freed_blocks()
        if (self.loss is None) == (self.batch_loss is None):
            raise TypeError("pass either loss, a function of (output, target), or batch_loss=")
        if self.reduction not in ("mean", "sum", "none"):
            msg = f'reduction= takes "mean", "sum" or "none", got {self.reduction!r}'
            raise ValueError(msg)

    def forward(self, batch: Any) -> Forward:
        """Run the model on a batch."""
        if self.batch_loss is not None:
            with Observed(self.model, active=self.observed) as observed:
                losses = self.batch_loss(self.model, batch)
            if not isinstance(losses, torch.Tensor) or losses.ndim != 1:
                got = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses)
                msg = f"batch_loss must return one loss a sample, a tensor (N,), got {got}"
                raise ValueError(msg)
            output = observed.output() if self.observed else None
            return Forward(objective=self, n=losses.shape[0], given=losses, output=output)
        x, y, weight = _parts(batch)
        n = next(samples.tensors(y)).shape[0]
        first = next(samples.tensors(x), None)
        if first is None or first.ndim == 0 or first.shape[0] != n:
            shape = None if first is None else tuple(first.shape)
            msg = f"x and y of a batch must have one row a sample, got {shape} and {n} targets"
            raise ValueError(msg)
        if weight is not None and tuple(weight.shape) != (n,):
            msg = f"sample weights must have shape ({n},), got {tuple(weight.shape)}"
            raise ValueError(msg)
        return Forward(objective=self, n=n, output=self.model(x), target=y, weight=weight)

    def singles(self, output: Any, target: Any) -> torch.Tensor:
        """ℓ_i (N,): `loss` of every sample as a batch of one."""
        assert self.loss is not None
        loss = self.loss

        def one(output: Any, target: Any) -> torch.Tensor:
            return loss(_as_batch(output), _as_batch(target)).reshape(())

        if self._vmap:
            try:
                with quiet_vmap():
                    return torch.vmap(one)(output, target)
            except (RuntimeError, ValueError, TypeError):
                self._vmap = False  # control flow on values, or an operation without vmap
        n = next(samples.tensors(target)).shape[0]
        rows = [slice(i, i + 1) for i in range(n)]
        pairs = [(samples.take(output, row), samples.take(target, row)) for row in rows]
        return torch.stack([loss(o, t).reshape(()) for o, t in pairs])


@dataclass(kw_only=True)
class Forward:
    """One evaluation of the model on a batch."""

    objective: Objective
    n: int
    output: Any = None
    target: Any = None
    weight: torch.Tensor | None = None
    given: torch.Tensor | None = None

    def total(self) -> torch.Tensor:
        """Σ w_i ℓ_i, the cheapest way that `check` has found to be right."""
        if self.given is not None or self.weight is not None:
            return self.losses().sum()
        value = _reduced(self.objective, self.output, self.target)
        return self.n * value if self.objective.reduction == "mean" else value.sum()

    def losses(self) -> torch.Tensor:
        """w_i ℓ_i (N,)."""
        if self.given is not None:
            return self.given
        if self.objective.reduction == "none":
            losses = _reduced(self.objective, self.output, self.target)
        else:
            losses = self.objective.singles(self.output, self.target)
        return losses if self.weight is None else self.weight * losses

    def unweighted(self) -> torch.Tensor:
        """ℓ_i (N,)."""
        return self.losses() if self.weight is None else replace(self, weight=None).losses()

    def leaves(self) -> list[torch.Tensor]:
        """The floating tensors of the output, each with one row a sample."""
        leaves = [t for t in samples.tensors(self.output) if t.dtype.is_floating_point]
        if self.given is not None:  # a model may give out more than the loss uses
            leaves = [t for t in leaves if t.ndim > 0 and t.shape[0] == self.n]
        return leaves

    def flat(self) -> torch.Tensor:
        """The outputs of a sample as one row (N, m)."""
        return torch.cat([t.reshape(self.n, -1) for t in self.leaves()], 1)

    def rows(self) -> list[torch.Tensor]:
        """What the model made of every sample: its outputs, or the losses where they are given."""
        made = self.output if self.given is None else self.given
        return [t.detach() for t in samples.tensors(made) if t.dtype.is_floating_point]

    def tame(self) -> torch.Tensor | None:
        """A curved function of the outputs that no rounding spoils, however sure the model is."""
        if self.given is not None:
            return None
        made = [t for t in samples.tensors(self.output) if t.dtype.is_floating_point]
        outputs = torch.cat([(t / t.detach().abs().max().clamp(min=1.0)).flatten() for t in made])
        slopes = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype, device=outputs.device)
        return (slopes * outputs + outputs.square()).sum()

    def weight_sum(self) -> float:
        """Σ w_i, or the number of samples."""
        return float(self.n) if self.weight is None else float(self.weight.double().sum())

    def check(self, sentinel: tuple[Any, Any] | None) -> tuple[Any, Any] | None:
        """Raise ValueError unless the loss of a batch is the mean (or sum) of its samples' losses.

        Compared are values and derivatives in the output, on the batch joined by the sentinel:
        one sample of an earlier batch, without which batches of one sample, or of one class,
        would prove nothing. Returns the sentinel for the next batch.
        """
        objective = self.objective
        if self.given is not None:
            return None
        if not all(t.ndim > 0 and t.shape[0] == self.n for t in samples.tensors(self.output)):
            shapes = [tuple(t.shape) for t in samples.tensors(self.output)]
            msg = f"the model's output must have {self.n} rows, one a sample, got {shapes}; {_ASK}"
            raise ValueError(msg)
        detached = samples.map_tensors(torch.Tensor.detach, self.output)
        pairs = (
            [(detached, self.target)] if sentinel is None else [sentinel, (detached, self.target)]
        )
        joined = samples.concatenate(pairs) or (detached, self.target)
        output, target = joined
        n = next(samples.tensors(target)).shape[0]
        if objective.reduction != "none" and n > 1:
            _check_reduction(objective, output, target, n)
        row = slice(0, 1)
        return sentinel or (samples.take(detached, row), samples.take(self.target, row))


def is_separable(forward: Forward, batch: Any, *, training: bool) -> bool:
    """Whether a sample's loss does not depend on what else is in the batch.

    Raises ValueError where it does and the loss is one of (output, target): ℓ_i is not defined.
    """
    n, objective = forward.n, forward.objective
    if training:  # random masks: nothing to compare with, and (x, y) is rows by convention
        return objective.batch_loss is None and samples.is_sliceable(batch, n)
    if n == 1 or not samples.is_sliceable(batch, n):
        return n == 1 and samples.is_sliceable(batch, n)
    rows = torch.tensor([n - 1, 0], device=next(samples.tensors(batch)).device)
    alone = objective.forward(samples.take(batch, rows)).rows()
    whole = [t[rows] for t in forward.rows()]
    if all(a.shape == b.shape and close(a, b) for a, b in zip(alone, whole, strict=True)):
        return True
    if objective.batch_loss is not None:
        return False
    raise ValueError(
        "the model's output for a sample depends on the other samples of its batch, so that no "
        "sample has a loss of its own; pass batch_loss=f with f(model, batch) -> losses (N,) if "
        "that is intended"
    )


def _check_reduction(objective: Objective, output: Any, target: Any, n: int) -> None:
    leaves: list[torch.Tensor] = []

    def leaf(t: torch.Tensor) -> torch.Tensor:
        if t.dtype.is_floating_point:
            # Outputs of moderate size: where a model is sure of everything all losses are zero,
            # and zero is any mean of zeros.
            t = (t.detach() / t.abs().max().clamp(min=1.0)).requires_grad_()
            leaves.append(t)
        return t

    output = samples.map_tensors(leaf, output)
    scale = n if objective.reduction == "mean" else 1
    whole = scale * _reduced(objective, output, target)
    parts = objective.singles(output, target).sum()
    if not whole.requires_grad or not parts.requires_grad:
        return
    pairs = [(whole.detach(), parts.detach())]
    slopes = [
        torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        for value in (whole, parts)
    ]
    pairs += list(zip(*slopes, strict=True))
    if all(close(a, b) for a, b in pairs):
        return
    msg = (
        f"the loss of a batch is not the {objective.reduction} of its samples' losses "
        f"({float(whole.detach()):.6g} against {float(parts.detach()):.6g} in sum over {n} "
        "samples, at outputs of moderate size): class weights, ignore_index, a mean over tokens, "
        "or another reduction. "
        f'Pass reduction="sum" with a loss that sums (and count=, what to divide by), or {_ASK}'
    )
    raise ValueError(msg)


def close(a: torch.Tensor, b: torch.Tensor, *, slack: float = 1.0) -> bool:
    """Equal up to what rounding in another order can do; far below any change of convention."""
    if a.numel() == 0:
        return True
    scale = torch.maximum(a.abs().max(), b.abs().max())
    tolerance = slack * 20 * _backend.eps(a.dtype) ** (3 / 4)
    # NaN compares as equal only to itself: a broken model is for the solver to report.
    same = ((a - b).abs() <= tolerance * scale) | (a.isnan() & b.isnan()) | (a == b)
    return bool(same.all())


_ASK = "pass batch_loss=f with f(model, batch) -> per-sample losses (N,)"


def _reduced(objective: Objective, output: Any, target: Any) -> torch.Tensor:
    assert objective.loss is not None
    value = objective.loss(output, target)
    ndim = 1 if objective.reduction == "none" else 0
    if not isinstance(value, torch.Tensor) or value.ndim != ndim:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        what = "one loss a sample, (N,)" if ndim else "one number"
        hint = "" if ndim else '; if it returns one loss a sample, pass reduction="none"'
        msg = f'with reduction="{objective.reduction}" loss must return {what}, got {got}{hint}'
        raise ValueError(msg)
    return value


def _as_batch(tree: Any) -> Any:
    return samples.map_tensors(lambda t: t[None], tree)


def _parts(batch: Any) -> tuple[Any, Any, torch.Tensor | None]:
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        size = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
        msg = (
            "a batch must be (x, y) or (x, y, sample_weight), got "
            f"{type(batch).__name__}{size}; for other batches {_ASK}"
        )
        raise TypeError(msg)
    x, y, weight = (*batch, None)[:3]
    if next(samples.tensors(y), None) is None or next(samples.tensors(x), None) is None:
        msg = (
            f"x and y of a batch must be tensors, got {type(x).__name__} and {type(y).__name__}; "
            "convert them (torch.as_tensor)"
        )
        raise TypeError(msg)
    if weight is not None and not isinstance(weight, torch.Tensor):
        msg = f"sample weights must be a tensor (N,), got {type(weight).__name__}"
        raise TypeError(msg)
    return x, y, weight
