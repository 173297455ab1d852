"""Prepared inverses on disk: a folder of `state.json` and `state.safetensors`, no pickle."""

from ._codec import register as register
from ._files import StateError as StateError
from .saved import load as load
from .saved import save as save
