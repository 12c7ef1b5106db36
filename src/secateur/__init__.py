"""Secateur: cut trained vision models down to smaller, faster dense ones.

The way through the house: `trace` finds what may be removed together, `score` says how much each channel matters,
`allocate` decides how much goes from where, `cut_` removes it. `prune_` does all four.
"""

from secateur.allocation import Plan, allocate
from secateur.criteria import Scores, score
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
from secateur.surgery import ModelSource, cut, cut_, load, prune_, save

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CutError",
    "DataError",
    "InputError",
    "ModelSource",
    "Network",
    "Plan",
    "PlanError",
    "Scores",
    "SecateurError",
    "TraceError",
    "allocate",
    "cut",
    "cut_",
    "load",
    "prune_",
    "save",
    "score",
    "trace",
]
