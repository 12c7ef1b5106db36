"""Allocate: decide how much to take from where."""

from secateur.allocation.allocate import allocate
from secateur.allocation.budget import Budget
from secateur.allocation.plan import Plan
from secateur.allocation.presets import PRESETS, Preset, find_preset

__all__ = ["PRESETS", "Budget", "Plan", "Preset", "allocate", "find_preset"]
