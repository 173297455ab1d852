"""Run as a script by the test of killed writers: python killed_writer.py FOLDER SECONDS."""

from __future__ import annotations

import sys
import time

import numpy as np

import invhvp as ih

N, M, P, BLOCK = 60, 20, 8, (5, 10)


def system(*, pause=0.0, flipped=False, damping=0.1):
    """An inverse, training and test gradients that count and slow down what is asked of them."""
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((N, P)), rng.standard_normal((M, P))
    if flipped:
        train[17] = -train[17]
    calls = {"solved": 0, "scored": 0}

    class Slow(ih.DenseGradients):
        def _matmat(self, V):
            if V.shape[1] != 4:  # the fingerprint
                calls["scored"] += 1
                time.sleep(pause)
            return super()._matmat(V)

        def _take(self, chosen):
            return Slow(self._rows[chosen])

    inverse = ih.Direct().prepare(ih.RankOneMean(ih.DenseGradients(train)), damping=damping)
    original = inverse.solve

    def solve(B, **options):
        calls["solved"] += 1
        time.sleep(pause)
        return original(B, **options)

    inverse.solve = solve
    return ih.Influence(inverse, Slow(train)), ih.DenseGradients(test), calls


if __name__ == "__main__":
    influence, test, _ = system(pause=float(sys.argv[2]))
    influence.write(test, sys.argv[1], block_shape=BLOCK, progress=False)
