"""Surgery: carry a plan out, and keep what came of it."""

from secateur.surgery.checkpoint import load, save
from secateur.surgery.cutting import cut, cut_
from secateur.surgery.prune import prune_
from secateur.surgery.sources import ModelSource, build_model, source_of

__all__ = ["ModelSource", "build_model", "cut", "cut_", "load", "prune_", "save", "source_of"]
