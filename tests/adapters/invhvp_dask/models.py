"""Models that the processes of a cluster import too."""

from __future__ import annotations

import os
from pathlib import Path

import torch


class Bilinear:
    """Gradients are x·y, the curvature is a diagonal matrix; solves are noted in a file."""

    n_parameters = 3

    def __init__(self, notes: Path, dtype: torch.dtype = torch.float64):
        self.notes = notes
        self.diagonal = torch.arange(1.0, 4.0, dtype=dtype)

    def rows(self, x, y):
        return x.to(self.diagonal.dtype) * y[:, None]

    def influence_factors(self, x, y):
        with self.notes.open("a") as file:
            file.write(f"{os.getpid()} {len(x)}\n")
        return self.rows(x, y) / self.diagonal

    def influences_from_factors(self, z_test_factors, x, y, mode="up"):
        if mode == "up":
            return z_test_factors @ self.rows(x, y).T
        return z_test_factors[:, None, :] * y[None, :, None]

    def solved(self):
        return [int(line.split()[1]) for line in self.notes.read_text().splitlines()]


class Handle(torch.utils.data.Dataset):
    """A data set that opens its file where it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __len__(self):
        return 40

    def __getitem__(self, i):
        x, y = torch.load(self.path)
        return x[i], y[i]
