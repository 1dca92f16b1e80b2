"""One table per architecture family: where, relative to a block, the tensors lie that every architecture shares.

The residual stream before and after a block is its input and output in every family, so tables only name what differs.
"""

from .family import Family
from .tables import FAMILIES, family_of

__all__ = ["FAMILIES", "Family", "family_of"]
