"""Influence functions on top of prepared inverses and gradient matrices."""

from .model import Influence as Influence
from .topk import TopK as TopK
