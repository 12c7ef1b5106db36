"""Allocate: decide how much to take from where."""

from secateur.allocation.allocate import DEFAULT_RATIO, allocate
from secateur.allocation.budget import Budget
from secateur.allocation.plan import Plan, make_plan
from secateur.allocation.presets import PRESETS, Preset, find_preset

__all__ = ["DEFAULT_RATIO", "PRESETS", "Budget", "Plan", "Preset", "allocate", "find_preset", "make_plan"]
