"""Estimates of norms, spectra and diagonals from operator products."""
