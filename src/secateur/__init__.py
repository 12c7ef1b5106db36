"""Secateur: cut trained vision models down to smaller, faster dense ones.

The way through the house: `trace` finds what may be removed together, `score` says how much each channel matters,
`allocate` decides how much goes from where, `cut_` removes it and, with calibration images, refits what is left.
`prune_` does all four. `drop_branches` takes whole residual branches out as well.
"""

from secateur.allocation import Plan, allocate
from secateur.cost import LatencyTable
from secateur.criteria import Scores, calibrate, score
from secateur.errors import (
    CheckpointError,
    CutError,
    DataError,
    InputError,
    PlanError,
    SecateurError,
    TraceError,
)
from secateur.graph import Network, trace
from secateur.surgery import (
    ModelSource,
    block_benefit,
    branch_scores,
    compensate_,
    cut,
    cut_,
    drop_branches,
    load,
    prune_,
    prune_steps_,
    save,
)

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CutError",
    "DataError",
    "InputError",
    "LatencyTable",
    "ModelSource",
    "Network",
    "Plan",
    "PlanError",
    "Scores",
    "SecateurError",
    "TraceError",
    "allocate",
    "block_benefit",
    "branch_scores",
    "calibrate",
    "compensate_",
    "cut",
    "cut_",
    "drop_branches",
    "load",
    "prune_",
    "prune_steps_",
    "save",
    "score",
    "trace",
]
