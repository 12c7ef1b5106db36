"""Scores: one number per channel, added up over everything that goes with the channel.

The criteria, by name. w is the slice of a tensor that goes with a channel, g the gradient of the mean loss summed over
the calibration batches, x the input of a layer that w multiplies.

| criterion | saliency | what it runs |
|---|---|---|
| `l1` | Σ abs(w) | nothing |
| `l2` | Σ w² | nothing |
| `lamp` | Σ w² as a share of what is left of the group once smaller ones have gone | nothing |
| `fpgm` | Σ ‖w - w'‖₂ over the other channels of the group, on output sides | nothing |
| `taylor` | Σ abs(w·g) | gradients |
| `taylor_signed` | abs(Σ w·g) over the whole channel | gradients |
| `hessian` | Σ w²·h, h the mean over samples of the squared gradient of one sample's loss | gradients by sample |
| `activation` | Σ abs(w)·‖x‖₂, on input sides | forward passes |
| `variance` | the variance of x, on input sides | forward passes |
| `obs` | the output error of the layers that read the channel, refitted without it | forward passes |
| `random` | uniform in [0, 1) | nothing |

`rank_mean(["l2", "taylor"])` is the mean of a channel's ranks by several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.criteria.calibration import Batches, Calibration, Loss, calibration_of
from secateur.criteria.criterion import Criterion, Saliency, Subject, find_criterion
from secateur.criteria.domains import Combination, combined, find_combination
from secateur.criteria.footprints import Footprints, check_finite, checked_tensors
from secateur.errors import InputError
from secateur.graph.network import Network

Given = Batches | Calibration


@dataclass(frozen=True, eq=False)
class Scores:
    """How much each channel matters: `values` (float64, [num_channels], read-only), larger means keep.

    Values of different groups are not yet comparable; if `normalize`, allocation divides them by their group's mean.
    `num_samples` is how many calibration samples went in, 0 if the criterion looks at none.
    """

    values: NDArray[np.float64]
    criterion: str
    normalize: bool = True
    num_samples: int = 0

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    def __str__(self) -> str:
        source = f"{self.num_samples:,} samples" if self.num_samples else "no calibration samples"
        spread = "none"
        if self.values.size:
            low, middle, high = np.quantile(self.values, (0.0, 0.5, 1.0))
            spread = f"least {low:.4g}, median {middle:.4g}, most {high:.4g}"
        return f"Scores by {self.criterion} of {self.values.size:,} channels from {source}: {spread}"

    def validate(self, network: Network) -> None:
        """Raises InputError if there is not one finite value for each channel of `network`, naming a group."""
        if self.values.shape != (network.num_channels,):
            raise InputError(
                f"scores by {self.criterion!r} have shape {self.values.shape}, but the network has "
                f"{network.num_channels} channels; were they computed for another network?"
            )
        bad = ~np.isfinite(self.values)
        if bad.any():
            group = next((group for group in network.groups if bad[group.channels].any()), None)
            where = "no group" if group is None else f"group {group.name!r}"
            count = int(bad.sum() if group is None else bad[group.channels].sum())
            raise InputError(f"scores by {self.criterion!r} are NaN or infinite for {count} channels, in {where}")


def score(
    network: Network,
    model: nn.Module,
    criterion: str | Criterion,
    batches: Given | Mapping[str, Given] | None = None,
    *,
    loss: Loss | None = None,
    seed: int = 0,
    combine: str | Combination | None = None,
) -> Scores:
    """Returns one score per channel of `network`, larger for what matters more.

    By most criteria (the table in `secateur.criteria.scores` has them all) it is the mean over the channel's scored
    axes of the saliency that goes with it. Scored axes are the sides of weights and the norm scales that it occupies;
    biases and embeddings do not count. The saliency of all indices that the channel takes along an axis is added up
    (the three rows of a fused qkv weight make one number), then over the axes, and divided by the number of axes. A
    head takes all that lies inside it. A channel without a scored axis has 0.

    Args:
        criterion: a name in `secateur.criteria.CRITERIA` or a criterion; `secateur.criteria.criterion` tells how to
            write one.
        batches: pairs (inputs, labels); inputs are a tensor, a tuple or a dict of tensors with one row per sample.
            They are moved to the model's device. Or what `calibrate` returns, so that what is computed for one
            criterion serves the next. Or either of these by domain: `{"photo": …, "art": …}`. Not read if the
            criterion needs none.
        loss: maps the model's output and the labels to a scalar, the mean over samples; by default the cross-entropy
            of `logits_of(output)`. A `Calibration` has its own.
        seed: of the draw of `random`.
        combine: how the domains' scores become one: `mean` (if not given), `worst`, `mean_minus_spread`,
            `sign_agreement`, or a function; formulas in `secateur.criteria.domains`.

    The model is left as it was: modes, gradients, `requires_grad`, buffers, torch's random state.

    Raises:
        InputError: unknown criterion or combination, no usable batches, fewer samples than a Gram matrix needs, NaN in
            weights, inputs, loss or scores, labels out of range, a calibration of another model or of weights that
            have changed since, or a model whose tensors do not have the sizes that `network` was traced with.
    """
    chosen = find_criterion(criterion) if isinstance(criterion, str) else criterion
    tensors = checked_tensors(network, model)
    subject = Subject(network, Footprints(network, tensors), seed=seed)
    shown = isinstance(chosen, Saliency) and chosen.shows_all()
    check_finite({n: t for n, t in tensors.items() if not (shown and n in subject.footprints.tensors)})
    if combine is not None and not isinstance(batches, Mapping):
        raise InputError("combine= is for batches by domain: pass a dict, {'photo': batches, 'art': batches}")
    if not chosen.needs_batches:
        scores = Scores(chosen.values(subject), chosen.name, chosen.normalize)
    elif batches is None:
        raise InputError(f"criterion {chosen.name!r} needs calibration batches: pass batches=, pairs (inputs, labels)")
    elif isinstance(batches, Mapping):
        calibrations = {str(name): _calibration(subject, model, given, loss) for name, given in batches.items()}
        scores = _of_domains(chosen, subject, calibrations, "mean" if combine is None else combine)
    else:
        calibration = _calibration(subject, model, batches, loss)
        values = chosen.values(replace(subject, calibration=calibration))
        scores = Scores(values, chosen.name, chosen.normalize, calibration.num_samples)
    scores.validate(network)
    return scores


def _of_domains(
    criterion: Criterion, subject: Subject, domains: Mapping[str, Calibration], combine: str | Combination
) -> Scores:
    if not domains:
        raise InputError("there are no domains: batches is an empty dict")
    values, normalize = combined(criterion, subject, domains, find_combination(combine))
    way = combine if isinstance(combine, str) else getattr(combine, "__name__", str(combine))
    num_samples = sum(calibration.num_samples for calibration in domains.values())
    return Scores(values, f"{criterion.name} ({way} of {', '.join(domains)})", normalize, num_samples)


def _calibration(subject: Subject, model: nn.Module, given: Given, loss: Loss | None) -> Calibration:
    """Returns the calibration given, if it is one for this model, or one of the batches given."""
    if not isinstance(given, Calibration):
        return calibration_of(subject.footprints, model, given, loss)
    if loss is not None:
        raise InputError("a calibration has its own loss: pass loss= to calibrate")
    tensors = subject.footprints.tensors
    if given.tensors.keys() != tensors.keys() or any(given.tensors[name] is not t for name, t in tensors.items()):
        raise InputError("the calibration was made for another model or network; call calibrate with this one")
    return given
