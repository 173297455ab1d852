"""Influence functions on top of prepared inverses and gradient matrices."""

from .certificates import CertifiedScores as CertifiedScores
from .certificates import SelfInfluenceBounds as SelfInfluenceBounds
from .curve import DampingCurve as DampingCurve
from .model import Influence as Influence
from .topk import TopK as TopK
