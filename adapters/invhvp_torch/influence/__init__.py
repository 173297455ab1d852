"""Influence functions of PyTorch models under the names that pyDVL's users know."""

from . import preconditioner as preconditioner
from .calculator import NestedTorchCatAggregator as NestedTorchCatAggregator
from .calculator import SequentialInfluenceCalculator as SequentialInfluenceCalculator
from .calculator import TorchCatAggregator as TorchCatAggregator
from .calculator import TorchNumpyConverter as TorchNumpyConverter
from .ekfac import EkfacInfluence as EkfacInfluence
from .model import InfluenceModel as InfluenceModel
from .modes import BlockMode as BlockMode
from .modes import InfluenceMode as InfluenceMode
from .modes import NotFittedError as NotFittedError
from .modes import SecondOrderMode as SecondOrderMode
from .modes import UnsupportedModeError as UnsupportedModeError
from .presets import ArnoldiInfluence as ArnoldiInfluence
from .presets import CgInfluence as CgInfluence
from .presets import DirectInfluence as DirectInfluence
from .presets import InverseHarmonicMeanInfluence as InverseHarmonicMeanInfluence
from .presets import LissaInfluence as LissaInfluence
from .presets import NystroemSketchInfluence as NystroemSketchInfluence
