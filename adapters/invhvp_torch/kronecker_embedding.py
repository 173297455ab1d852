"""The sums of an embedding: its inputs are words, so that their factor is a diagonal."""

from __future__ import annotations

import torch

from invhvp.estimate import FactorAccumulator, MomentAccumulator

from .kronecker_layers import Seen, Unit


def _terms(calls: list[Seen]) -> tuple[torch.Tensor, torch.Tensor]:
    """Words (N, T) and derivatives (N, C, T, size), zero where the word is padding."""
    words, slopes = [], []
    for call in calls:
        x = call.x.reshape(call.x.shape[0], -1)
        d = call.d.reshape(x.shape[0], -1, x.shape[1], call.d.shape[-1])
        padding = call.module.padding_idx
        if padding is not None:
            d = d * x.ne(padding)[:, None, :, None].to(d.dtype)
        words.append(x)
        slopes.append(d)
    d = torch.cat(slopes, 2)
    return torch.cat(words, 1), d.float() if d.element_size() < 4 else d


def _same(words: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (words[:, :, None] == words[:, None, :]).to(like.dtype)


def add_factors(
    sums: FactorAccumulator,
    unit: Unit,
    calls: list[Seen],
    weights: torch.Tensor | None,
) -> None:
    """Σ d dᵀ, and Σ w of every word, of positions that have a derivative."""
    words, d = _terms(calls)
    valid = (d != 0).any(3).any(1).double()
    same = _same(words, d)
    squares = ((same[:, None] @ d) * d).double().sum()
    if sums.sharing == "reduce":
        number = valid.sum(1, keepdim=True).clamp(min=1)
        share = valid / number
        counts = share * (same.double() @ share[:, :, None])[:, :, 0]  # of its square, by word
        d, positions = d.sum(2, keepdim=True), (valid.sum(1) > 0).double()
    else:
        counts, positions = valid, valid.sum(1)
    if weights is not None:
        counts, positions = counts * weights[:, None], positions * weights
    flat = d.flatten(0, 2)
    A = torch.zeros(unit.shape[1], dtype=torch.float64, device=d.device)
    A.index_add_(0, words.reshape(-1), counts.reshape(-1))
    S = (flat.mT @ flat).double()
    sums.add_sums(unit.name, S=S, A=A, positions=positions.sum()[None], squares=squares[None])


def add_moments(sums: MomentAccumulator, unit: Unit, calls: list[Seen]) -> None:
    """Σ (Uᵀ G)² by word: positions with the same word add up before they are squared."""
    words, d = _terms(calls)
    U, _ = sums.bases[unit.name]
    y = d @ U.to(d.dtype)
    products = (y * (_same(words, d)[:, None] @ y)).sum(1).double()  # (N, T, size)
    found = torch.zeros(unit.shape[::-1], dtype=torch.float64, device=d.device)
    found.index_add_(0, words.reshape(-1), products.flatten(0, 1))
    sums.add_sums(unit.name, moments=found.mT)
