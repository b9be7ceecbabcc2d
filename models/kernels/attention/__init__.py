"""Attention: one call, its definition and the forms that match it."""

from .api import IMPLEMENTATIONS as IMPLEMENTATIONS
from .api import attention as attention
from .blocks import Blocks as Blocks
from .decode import decode_attention as decode_attention
from .decode import merge as merge
