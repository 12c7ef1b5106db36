"""Scores for all channels of a network at once: the criteria, their registry, and what they know of the samples."""

from secateur.criteria import elementary, layerwise  # noqa: F401  they register their criteria
from secateur.criteria.calibration import Batches, Calibration, Loss, Statistic, calibrate
from secateur.criteria.criterion import CRITERIA, ByChannel, Criterion, Saliency, Subject, find_criterion, register
from secateur.criteria.domains import COMBINATIONS, Combination, SignAgreement, mean_minus_spread
from secateur.criteria.elementary import rank_mean
from secateur.criteria.gradients import (
    cross_entropy,
    gradient_sum,
    logits_of,
    mean_squared_gradient,
    undisturbed,
)
from secateur.criteria.inputs import layer_grams, layer_inputs
from secateur.criteria.scores import Scores, score

__all__ = [
    "COMBINATIONS",
    "CRITERIA",
    "Batches",
    "ByChannel",
    "Calibration",
    "Combination",
    "Criterion",
    "Loss",
    "Saliency",
    "Scores",
    "SignAgreement",
    "Statistic",
    "Subject",
    "calibrate",
    "cross_entropy",
    "find_criterion",
    "gradient_sum",
    "layer_grams",
    "layer_inputs",
    "logits_of",
    "mean_minus_spread",
    "mean_squared_gradient",
    "rank_mean",
    "register",
    "score",
    "undisturbed",
]
