"""Influence functions on top of prepared inverses and gradient matrices."""

from . import evaluate as evaluate
from .certificates import CertifiedScores as CertifiedScores
from .certificates import SelfInfluenceBounds as SelfInfluenceBounds
from .curve import DampingCurve as DampingCurve
from .model import Influence as Influence
from .store import read_blocks as read_blocks
from .topk import TopK as TopK
from .topk import top_k as top_k
