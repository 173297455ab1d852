"""Sums of rows by key, in one order whatever the device."""

from __future__ import annotations

from dataclasses import dataclass

from .. import _arithmetic, _backend
from ..protocols import Array
from . import _sums

_TILE = 16  # terms: as many multiplications a number as pairwise sums would move numbers


@dataclass(frozen=True)
class Groups:
    """Terms in the order of their keys: a scatter would add them in any order on a GPU."""

    order: Array  # of the terms
    rank: Array  # of a term among those of its key
    last: Array  # the last term of every key in range(size)
    present: Array  # whether a key has terms
    most: int  # no key has more

    @classmethod
    def of(cls, keys: Array, size: int, most: int) -> Groups:
        """Of keys (M,) in range(size), of which no one occurs more than `most` times."""
        xp, dev = _backend.namespace(keys), _backend.device(keys)
        order, keys, rank = _sorted(keys)
        every = xp.arange(size, dtype=keys.dtype, device=dev)
        end = xp.astype(xp.searchsorted(keys, every, side="right"), keys.dtype)
        last = xp.where(end > 0, end - 1, end)
        return cls(order, rank, last, xp.take(keys, last, axis=0) == every, most)

    def sums(self, terms: Array) -> Array:
        """The sums (size, c) of the rows of `terms` (M, c) with one key."""
        return self.sums_in_order(_backend.namespace(terms).take(terms, self.order, axis=0))

    def sums_in_order(self, terms: Array) -> Array:
        """The same for terms that are in order already.

        Within tiles of 16 terms by products with zeros and ones, pairwise across tiles.
        """
        xp = _backend.namespace(terms)
        work = _padded(_sums.single(terms), -terms.shape[0] % _TILE)
        n, c = work.shape[0] // _TILE, work.shape[1]
        ends = _arithmetic.matmul(self._tiles(work), xp.reshape(work, (n, _TILE, c)))
        carried = self._carried(ends[:, -1, :])
        sums = xp.take(xp.reshape(ends, (n * _TILE, c)), self.last, axis=0)
        # What stands before the tile of a key's last term: nothing, if its first is in there.
        before = xp.take(self.rank, self.last, axis=0) > self.last % _TILE
        tile = xp.where(before, self.last // _TILE - 1, xp.zeros_like(self.last))
        earlier = xp.take(carried, tile, axis=0)
        sums = sums + xp.where(before[:, None], earlier, xp.zeros_like(earlier))
        sums = xp.where(self.present[:, None], sums, xp.zeros_like(sums))
        return _sums.narrow(sums, terms)

    def _tiles(self, like: Array) -> Array:
        """Ones (n, 16, 16) where a term of a tile is of the same key as a later one, or is it."""
        xp = _backend.namespace(like)
        rank = _padded(self.rank[:, None], -self.rank.shape[0] % _TILE)
        rank = xp.reshape(rank, (-1, _TILE, 1))
        place = xp.arange(_TILE, dtype=rank.dtype, device=_backend.device(rank))
        back = (place[:, None] - place[None, :])[None, :, :]
        return xp.astype((back >= 0) & (back <= rank), like.dtype)

    def _carried(self, ends: Array) -> Array:
        """The sums of the keys of the last terms of tiles, from their first terms on."""
        xp, n = _backend.namespace(ends), ends.shape[0]
        tile = xp.arange(n, dtype=self.rank.dtype, device=_backend.device(self.rank))
        last = (tile + 1) * _TILE - 1
        rank = _padded(self.rank[:, None], n * _TILE - self.rank.shape[0])[:, 0]
        first = last - xp.take(rank, last, axis=0)
        tiles = tile - first // _TILE  # that the key of the last term goes back
        step = 1
        while step < n and (step - 1) * _TILE < self.most:
            shifted = xp.concat([xp.zeros_like(ends[:step, :]), ends[:-step, :]], axis=0)
            inside = (tiles >= step)[:, None]
            ends = ends + xp.where(inside, shifted, xp.zeros_like(shifted))
            step *= 2
        return ends


def _padded(x: Array, short: int) -> Array:
    """Rows of zeros below."""
    if short == 0:
        return x
    xp = _backend.namespace(x)
    zeros = xp.zeros((short, x.shape[1]), dtype=x.dtype, device=_backend.device(x))
    return xp.concat([x, zeros], axis=0)


def _sorted(keys: Array) -> tuple[Array, Array, Array]:
    """The order of the keys, the keys in it, and the rank of each among its equals."""
    xp = _backend.namespace(keys)
    order = xp.argsort(keys, stable=True)
    keys = xp.take(keys, order, axis=0)
    position = xp.arange(keys.shape[0], dtype=keys.dtype, device=_backend.device(keys))
    first = xp.searchsorted(keys, keys, side="left")
    return order, keys, position - xp.astype(first, keys.dtype)


def most_equal(keys: Array) -> tuple[int, int, int]:
    """How often the most frequent key occurs, the lowest and the highest one.

    While tracing nobody can look: as if all were equal, and zero.
    """
    xp = _backend.namespace(keys)
    flat = xp.reshape(keys, (-1,))
    if _backend.is_tracing(flat):
        return flat.shape[0], 0, 0
    _, flat, rank = _sorted(flat)
    found = _backend.to_host(xp.stack([xp.max(rank), flat[0], flat[-1]]))
    return int(found[0]) + 1, int(found[1]), int(found[2])
