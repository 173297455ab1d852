"""Linear systems with known answers, on any array library.

Every function builds its problem in float64 on the host and places it `like=` an array (NumPy
float64 by default). The values in `Problem.constants` are documented results to compare with.
"""

from .classics import hilbert as hilbert
from .classics import ji_li_breakdown as ji_li_breakdown
from .classics import poisson_1d as poisson_1d
from .classics import poisson_2d as poisson_2d
from .classics import strakos as strakos
from .classics import wilkinson as wilkinson
from .classics import wishart as wishart
from .problem import Problem as Problem
from .sampled import RegressionProblem as RegressionProblem
from .sampled import linear_regression as linear_regression
from .sampled import rank_deficient_gauss_newton as rank_deficient_gauss_newton
from .spectra import distinct_eigenvalues as distinct_eigenvalues
from .spectra import from_spectrum as from_spectrum
from .spectra import nn_spectrum as nn_spectrum
from .spectra import right_hand_sides as right_hand_sides
from .spectra import spectrum_clustered as spectrum_clustered
from .spectra import spectrum_decay as spectrum_decay
from .spectra import spectrum_geometric as spectrum_geometric
from .spectra import spectrum_indefinite as spectrum_indefinite
from .spectra import spectrum_network as spectrum_network
from .spectra import spectrum_step as spectrum_step
