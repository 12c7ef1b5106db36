"""Surgery: carry a plan out."""

from secateur.surgery.cut import cut, cut_

__all__ = ["cut", "cut_"]
