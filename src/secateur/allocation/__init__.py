"""Allocate: decide how much to take from where."""

from secateur.allocation.allocate import allocate
from secateur.allocation.plan import Plan

__all__ = ["Plan", "allocate"]
