"""Surgery: carry a plan out, and keep what came of it."""

from secateur.surgery.branches import block_benefit, branch_scores, drop_branches
from secateur.surgery.checkpoint import load, save
from secateur.surgery.compensation import Compensation, compensate_
from secateur.surgery.cutting import cut, cut_
from secateur.surgery.prune import prune_, prune_steps_
from secateur.surgery.sources import ModelSource, build_model, source_of

__all__ = [
    "Compensation",
    "ModelSource",
    "block_benefit",
    "branch_scores",
    "build_model",
    "compensate_",
    "cut",
    "cut_",
    "drop_branches",
    "load",
    "prune_",
    "prune_steps_",
    "save",
    "source_of",
]
