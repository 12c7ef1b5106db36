"""Scores for all channels of a network at once: the criteria, their registry, and what they know of the loss."""

from secateur.criteria.criterion import CRITERIA, Criterion, Draw, Saliency, find_criterion, register
from secateur.criteria.gradients import (
    Batches,
    Calibration,
    Loss,
    Statistic,
    cross_entropy,
    gradient_sum,
    logits_of,
    mean_squared_gradient,
    undisturbed,
)
from secateur.criteria.scores import Scores, score

__all__ = [
    "CRITERIA",
    "Batches",
    "Calibration",
    "Criterion",
    "Draw",
    "Loss",
    "Saliency",
    "Scores",
    "Statistic",
    "cross_entropy",
    "find_criterion",
    "gradient_sum",
    "logits_of",
    "mean_squared_gradient",
    "register",
    "score",
    "undisturbed",
]
