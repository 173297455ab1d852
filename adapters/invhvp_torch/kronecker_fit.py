"""Fitting K-FAC and EKFAC: the passes over the data, what they add up, what may be kept."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from invhvp.estimate import BlockAccumulator, FactorAccumulator, MomentAccumulator
from invhvp.operators import LinearOperator

from . import samples
from .checkpoint import Checkpoint, check_data
from .data import Cached, Streamed
from .kronecker_layers import Collector, Unit, find_units
from .kronecker_shards import Shards
from .kronecker_sums import Calls, add_factors, add_moments, n_bytes
from .parameters import Parameters
from .rows import Rows


@dataclass(kw_only=True)
class Fit:
    """The sums of one fit, stage after stage: factors (a stage each partition), then moments.

    Args:
        model, parameters: what is fitted.
        rows: what computes derivatives, not probed yet.
        corrected: whether eigenvalues are corrected (EKFAC).
        sharing: "expand" or "reduce".
        memory: bytes for the factors of a partition, and for what is kept of a pass.
        checkpoint: where sums are saved, or None.
        tick: called with the number of passes to come, and after every batch without.
        shards: the processes that have the rest of the data; sums are added after every pass.
    """

    model: torch.nn.Module
    parameters: Parameters
    rows: Rows
    corrected: bool
    sharing: str
    memory: float
    checkpoint: Checkpoint | None
    tick: Callable[[int], None]
    shards: Shards
    units: list[Unit] = field(default_factory=list)
    blocks: dict[str, LinearOperator] = field(default_factory=dict)
    traces: dict[str, float] = field(default_factory=dict)
    n: int = 0
    weight: float = 0.0

    def run(self, batches: Cached | Streamed, count: float | None) -> None:
        """Fill `units`, `blocks` and `traces`."""
        with self.shards.together():
            self.rows.probe(next(iter(batches)))
            self.units = find_units(self.model, self.parameters, self.rows.factored)
        self.shards.check_alike([(unit.kind, unit.blocks, unit.shape) for unit in self.units])
        named = {name for unit in self.units for name in unit.parameters}
        layout = self.parameters.layout
        self._rest = {name: layout[name].size for name in layout.names if name not in named}
        self._exact, self._before = None, None
        if self._rest:
            self._exact = BlockAccumulator(self._rest, like=self.parameters.like)
        self._count, self._bases, self._n_batches = count, {}, len(batches)
        groups = self._partitions()
        self.tick(len(batches) * (len(groups) + (self.corrected and bool(self.units))))
        start, position = self._resume(groups)
        kept: list[Calls] | None = [] if len(groups) == 1 and self.corrected else None
        if self.checkpoint is not None or not self.units:
            kept = None  # a pass that is resumed has lost what was kept
        for stage in range(start, len(groups)):
            kept = self._factors(batches, groups, stage, position, kept)
            position = 0
        self.rows.log()
        if self._exact is not None:
            self.blocks |= self._exact.operators()
        if self.corrected and self.units:
            self._moments(batches, len(groups), position if start == len(groups) else 0, kept)

    # ----------------------------------------------------------------------------- the stages

    def _factors(
        self,
        batches: Cached | Streamed,
        groups: list[list[Unit]],
        stage: int,
        position: int,
        kept: list[Calls] | None,
    ) -> list[Calls] | None:
        with self.shards.together():
            kept = self._read_factors(batches, groups[stage], stage, position, kept)
        self.shards.add(self._sums)
        if stage == 0:
            self.shards.add(self._exact)
            self.n, self.weight = int(self.shards.total(self.n)), self.shards.total(self.weight)
        self._finish_factors(groups, stage)
        return kept

    def _read_factors(
        self,
        batches: Cached | Streamed,
        wanted: list[Unit],
        stage: int,
        position: int,
        kept: list[Calls] | None,
    ) -> list[Calls] | None:
        sums = self._sums
        assert isinstance(sums, FactorAccumulator | None)
        first = stage == 0
        skipped = frozenset() if first else frozenset(self._rest)
        index, crc, sentinel, used = -1, 0, None, 0
        for index, batch in enumerate(batches):
            crc = self._print(batch, crc)
            if self._is_done(index, position, crc):
                continue
            take = Collector(self.units, wanted, skipped)
            blocks, sentinel, forward = self.rows.of(batch, index, sentinel, check=first, take=take)
            for unit in wanted:
                if unit.weight in take.calls:
                    add_factors(sums, unit, take.calls[unit.weight], forward)
            if sums is not None:
                sums.count(forward.weight_sum())
            if first:
                self.n += forward.n
                self.weight += forward.weight_sum()
                if self._exact is not None:
                    for name, block in blocks.items():
                        self._exact.add(name, block)
                    self._exact.count(forward.weight_sum())
            if kept is not None:
                used += n_bytes(take.calls)
                kept.append(take.calls)
                if used / (index + 1) * len(batches) > self.memory / 2:
                    kept = None
            self.tick(0)
            self._save(stage, index + 1, crc, last=index + 1 == len(batches))
        self._check_pass(index + 1, position, crc)
        return kept

    def _finish_factors(self, groups: list[list[Unit]], stage: int) -> None:
        sums = self._sums
        if self._count is not None:
            for found in (sums, self._exact):
                if found is not None:
                    found.total = self._count
        if isinstance(sums, FactorAccumulator):
            self.traces |= sums.traces()
            if self.corrected:
                for name, (U, V) in sums.eigenbases().items():
                    # As they come back from a file: another memory order rounds otherwise.
                    V = None if V is None else V.contiguous()
                    self._bases[name] = (U.contiguous(), V)
            else:
                self.blocks |= sums.kronecker()
        self._sums = self._new_sums(groups, stage + 1)
        if self.corrected:
            self._save(stage + 1, 0, self._crc, last=True)

    def _moments(
        self, batches: Cached | Streamed, stage: int, position: int, kept: list[Calls] | None
    ) -> None:
        sums = self._sums
        assert isinstance(sums, MomentAccumulator)
        with self.shards.together():
            self._read_moments(sums, batches, stage, position, kept)
        self.shards.add(sums)
        sums.total = self.weight if self._count is None else self._count
        self.blocks |= sums.eigen_kronecker()

    def _read_moments(
        self,
        sums: MomentAccumulator,
        batches: Cached | Streamed,
        stage: int,
        position: int,
        kept: list[Calls] | None,
    ) -> None:
        index, crc = -1, 0
        for index, batch in enumerate(batches if kept is None else range(len(kept))):
            if kept is None:
                crc = self._print(batch, crc)
                if self._is_done(index, position, crc):
                    continue
                take = Collector(self.units, self.units, frozenset(self._rest))
                _, _, forward = self.rows.of(batch, index, None, check=False, take=take)
                sums.count(forward.weight_sum())
                calls = take.calls
            else:
                calls, kept[index] = kept[index], {}
            for unit in self.units:
                if unit.weight in calls:
                    add_moments(sums, unit, calls.pop(unit.weight))
            self.tick(0)
            self._save(stage, index + 1, crc, last=index + 1 == len(batches))
        self._check_pass(index + 1, position, crc)

    def _new_sums(
        self, groups: list[list[Unit]], stage: int
    ) -> FactorAccumulator | MomentAccumulator | None:
        like = self.parameters.like
        wanted = groups[stage] if stage < len(groups) else self.units
        shapes = {name: unit.shape for unit in wanted for name in unit.blocks}
        if not shapes:
            return None
        if stage < len(groups):
            return FactorAccumulator(shapes, like=like, sharing=self.sharing)
        return MomentAccumulator(self._bases, shapes, like=like) if self.corrected else None

    def _partitions(self) -> list[list[Unit]]:
        """Units in order, as many together as the float64 sums and eigenvectors have room for."""
        groups: list[list[Unit]] = [[]]
        used = 0.0
        for unit in self.units:
            o, i = unit.shape
            # Sums, what is decomposed, its eigenvectors, and workspace.
            size = 32.0 * unit.groups * (o * o + (0 if unit.kind == "embedding" else i * i))
            if self.corrected and groups[-1] and used + size > self.memory:
                groups.append([])
                used = 0.0
            groups[-1].append(unit)
            used += size
        return groups

    # ------------------------------------------------------------------------- the checkpoint

    def _print(self, batch: Any, crc: int) -> int:
        if self.checkpoint is None:
            return 0
        return zlib.crc32(samples.fingerprint(batch).to_bytes(8, "little"), crc)

    def _is_done(self, index: int, position: int, crc: int) -> bool:
        """Whether a batch is in the resumed sums; ValueError where the data were others."""
        check_data(index + 1 != position or crc == self._crc)
        return index < position

    def _check_pass(self, n: int, position: int, crc: int) -> None:
        """ValueError after fewer batches than were saved, or others than in the pass before."""
        check_data(n >= position and self._before in (None, crc))
        self._crc, self._before = crc, None

    def _save(self, stage: int, position: int, crc: int, *, last: bool) -> None:
        if self.checkpoint is None or not (last or position % self.checkpoint.every == 0):
            return
        tensors, totals = {}, {}
        for kind, sums in (("sums", self._sums), ("exact", self._exact)):
            if sums is None:
                continue
            state = sums.state()
            totals[kind] = {key: state.pop(key) for key in ("fingerprint", "total")}
            tensors |= {f"{kind}:{key}": value for key, value in state.items()}
        for name, pair in self._bases.items():
            tensors |= {f"{w}:{name}": M for w, M in zip("UV", pair, strict=True) if M is not None}
        said = {
            "stage": stage,
            "position": position,
            "batches": self._n_batches,
            "crc": crc,
            "totals": totals,
            "traces": self.traces,
            "n": self.n,
            "weight": self.weight,
        }
        self.checkpoint.save(tensors, said)

    def _resume(self, groups: list[list[Unit]]) -> tuple[int, int]:
        """The stage and the batch to go on with."""
        device = self.parameters.like.device
        found = None
        if self.checkpoint is not None:  # processes that were ahead go back to the others
            stage = int(self.shards.least(self.checkpoint.last_stage()))
            with self.shards.together():
                found = self.checkpoint.load(device, stage)
        if found is None:
            self._sums = self._new_sums(groups, 0)
            return 0, 0
        tensors, said = found
        self.n, self.weight, self.traces = said["n"], said["weight"], said["traces"]
        self._crc = said["crc"]
        check_data(said.get("batches") == self._n_batches)
        self._before = None if said["position"] else self._crc
        for key, U in tensors.items():
            if key.startswith("U:"):
                name = key.removeprefix("U:")
                self._bases[name] = (U, tensors.get(f"V:{name}"))
        self._sums = self._new_sums(groups, said["stage"])
        for kind, sums in (("sums", self._sums), ("exact", self._exact)):
            if sums is not None:
                state = {
                    key.removeprefix(f"{kind}:"): value
                    for key, value in tensors.items()
                    if key.startswith(f"{kind}:")
                }
                sums.load({**state, **said["totals"][kind]})
        return said["stage"], said["position"]
