"""What a training step minimises: ERM, CORAL, GroupDRO and mixup across domains, as DomainBed defines them.

The formulas are those of the released DomainBed (Gulrajani and Lopez-Paz, arXiv 2007.01434, `algorithms.py`), where a
step has one mini-batch for each source domain. Here a step has one batch with any number of images of each domain;
where the numbers are equal, the two are the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy, one_hot, pad

from secateur.errors import InputError
from secateur.training.choices import chosen


@dataclass(frozen=True)
class Step:
    """What a loss is computed from.

    `logits` [B, C]; `targets` [B] as integers 0 … C - 1 or [B, C] as probabilities; `domains` [B] as integers counted
    from 0; `features` [B, D], what the classifier reads, where the objective needs them.
    """

    logits: Tensor
    targets: Tensor
    domains: Tensor
    features: Tensor | None = None


class Objective(ABC):
    """A loss over the images of several domains.

    Under several processes each gives its own part of the batch. CORAL and GroupDRO, which look at domains as wholes,
    return the loss of the global batch (see `gathered`); ERM and MixupDomains return the mean over the images given.
    """

    needs_features: bool = False

    def __init__(self, *, num_classes: int, label_smoothing: float = 0.0) -> None:
        """`label_smoothing` in [0, 1) is applied once, where integer labels become probabilities: soft targets stay."""
        if num_classes < 1:
            raise InputError(f"num_classes must be at least 1, found {num_classes}")
        if not 0.0 <= label_smoothing < 1.0:
            raise InputError(f"label_smoothing must be in [0, 1), found {label_smoothing}")
        self.num_classes, self.label_smoothing = num_classes, label_smoothing

    @abstractmethod
    def __call__(self, step: Step) -> Tensor:
        """Returns the loss to be minimised, a scalar that gradients flow through."""

    def mix(self, images: Tensor, targets: Tensor, domains: Tensor) -> tuple[Tensor, Tensor]:
        """Returns images [B, 3, H, W] and targets to train on instead; here those given."""
        return images, targets

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all that the next step depends on besides its arguments."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state_dict` returned; raises `InputError` if it is of another objective."""
        if set(state) != set(self.state_dict()):
            raise InputError(
                f"the state of {type(self).__name__} has {sorted(self.state_dict())}, found {sorted(state)}"
            )

    def losses(self, step: Step) -> Tensor:
        """Returns the cross-entropy of each image [B], in nats."""
        smoothing = 0.0 if step.targets.is_floating_point() else self.label_smoothing
        return cross_entropy(step.logits, step.targets, reduction="none", label_smoothing=smoothing)


class ERM(Objective):
    """Empirical risk minimisation (Vapnik, 1998): mean cross-entropy of all images, whatever their domain."""

    def __call__(self, step: Step) -> Tensor:
        smoothing = 0.0 if step.targets.is_floating_point() else self.label_smoothing
        return cross_entropy(step.logits, step.targets, label_smoothing=smoothing)


class CORAL(Objective):
    """Deep CORAL (Sun and Saenko, arXiv 1607.01719), in DomainBed's form, which compares means as well.

        (1/m) Σ_i CE_i + weight · mean over pairs i < j of [ ‖μ_i - μ_j‖² / D + ‖C_i - C_j‖²_F / D² ]

    over the m domains in the batch, with μ and C the mean and covariance (divisor n - 1) of their features [n, D].
    `weight` is DomainBed's mmd_gamma: default 1, searched over 10^U(-1, 1). A domain with a single image in the batch
    has no covariance and takes no part in the second term.
    """

    needs_features = True

    def __init__(self, *, num_classes: int, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(num_classes=num_classes, label_smoothing=label_smoothing)
        if not weight >= 0.0:
            raise InputError(f"weight must be 0 or more, found {weight}")
        self.weight = weight

    def __call__(self, step: Step) -> Tensor:
        if step.features is None:
            raise InputError("CORAL compares features: give Step the classifier's inputs, see classifier_inputs")
        step = gathered(step)
        assert step.features is not None
        losses, features = self.losses(step), step.features.float()
        masks = [step.domains == domain for domain in step.domains.unique()]
        loss = torch.stack([losses[mask].mean() for mask in masks]).mean()
        moments = [_moments(features[mask]) for mask in masks if mask.sum() > 1]
        distances = [(a - b).square().mean() + (c - d).square().mean() for (a, c), (b, d) in combinations(moments, 2)]
        return loss + self.weight * torch.stack(distances).mean() if distances else loss


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean [1, D] and covariance [D, D] of features [n, D]."""
    mean = features.mean(dim=0, keepdim=True)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


class GroupDRO(Objective):
    """Group distributionally robust optimisation (Sagawa et al., arXiv 1911.08731, algorithm 1).

        q_d ← q_d exp(eta · CE_d) / Σ …, then loss = Σ_d q_d CE_d

    with q uniform at first and CE_d the mean cross-entropy of the images of domain d. `eta` is DomainBed's
    groupdro_eta: default 0.01, searched over 10^U(-3, -1). A domain without images in the batch is not updated and adds
    no loss.
    """

    def __init__(self, *, num_classes: int, eta: float = 1e-2, label_smoothing: float = 0.0) -> None:
        super().__init__(num_classes=num_classes, label_smoothing=label_smoothing)
        if not eta >= 0.0:
            raise InputError(f"eta must be 0 or more, found {eta}")
        self.eta = eta
        # Logarithms before normalisation, so that a domain first met later starts from where all domains started.
        self.log_q = torch.zeros(0, dtype=torch.float64)

    @property
    def q(self) -> Tensor:
        """The weights of the domains met so far [domains], summing to 1."""
        return self.log_q.softmax(dim=0)

    def __call__(self, step: Step) -> Tensor:
        step = gathered(step)
        losses = self.losses(step)
        present = step.domains.unique()
        means = torch.stack([losses[step.domains == domain].mean() for domain in present])
        index = present.cpu()
        self.log_q = pad(self.log_q, (0, max(0, int(index.max()) + 1 - len(self.log_q))))
        self.log_q[index] += self.eta * means.detach().cpu().double()
        return means @ self.q[index].to(means)

    def state_dict(self) -> dict[str, Tensor]:
        return {"log_q": self.log_q.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.log_q = state["log_q"].detach().cpu().double().clone()


class MixupDomains(Objective):
    """Mixup (Zhang et al., arXiv 1710.09412) of images from different domains, as in DomainBed.

    The domains of a batch are put into a random circle, and each image x_i becomes λ x_i + (1 - λ) x_j with x_j from
    the next domain and one λ ~ Beta(alpha, alpha) for each domain; the loss is the cross-entropy against the targets
    mixed likewise. `alpha` is DomainBed's mixup_alpha: default 0.2. Images meet in the order of the batch; where the
    next domain has fewer, its images are used again. A batch of a single domain stays as it is.
    """

    def __init__(self, *, num_classes: int, alpha: float = 0.2, label_smoothing: float = 0.0) -> None:
        super().__init__(num_classes=num_classes, label_smoothing=label_smoothing)
        if not alpha > 0.0:
            raise InputError(f"alpha must be positive, found {alpha}")
        self.alpha = alpha

    def __call__(self, step: Step) -> Tensor:
        return self.losses(step).mean()

    def mix(self, images: Tensor, targets: Tensor, domains: Tensor) -> tuple[Tensor, Tensor]:
        """Returns images and targets [B, C] mixed across domains; draws from torch's global generator."""
        soft = targets if targets.is_floating_point() else self._soft(targets)
        present = domains.unique()
        circle = present[torch.randperm(len(present)).to(present.device)]
        partner = torch.arange(len(domains), device=domains.device)
        share = torch.ones(len(domains), device=images.device)
        for here, there in pairwise([*circle, circle[0]]):
            own, other = (domains == here).nonzero()[:, 0], (domains == there).nonzero()[:, 0]
            partner[own] = other[torch.arange(len(own), device=other.device) % len(other)]
            share[own] = torch.distributions.Beta(self.alpha, self.alpha).sample().to(share)
        own, rest = share.view(-1, 1, 1, 1).to(images.dtype), share.view(-1, 1)
        return own * images + (1 - own) * images[partner], rest * soft + (1 - rest) * soft[partner]

    def _soft(self, labels: Tensor) -> Tensor:
        """Returns integer labels as smoothed probabilities [B, C]."""
        return (1 - self.label_smoothing) * one_hot(labels, self.num_classes) + self.label_smoothing / self.num_classes


OBJECTIVES: dict[str, type[Objective]] = {
    "erm": ERM,
    "coral": CORAL,
    "groupdro": GroupDRO,
    "mixup_domains": MixupDomains,
}
"""Objectives by name."""


def find_objective(name: str, *, num_classes: int, **options: float) -> Objective:
    """Returns a fresh objective by name: erm, coral (`weight`), groupdro (`eta`) or mixup_domains (`alpha`).

    All take `label_smoothing`, the share of each integer label that is spread evenly over all classes.

        objective = find_objective("coral", num_classes=7, weight=0.5, label_smoothing=0.1)
        loss = objective(Step(logits, targets, domains, features))

    Raises `InputError` for an unknown name or option, and for values out of range.
    """
    return chosen("objective", name, OBJECTIVES, {"num_classes": num_classes, **options})


def gathered(step: Step) -> Step:
    """Returns the step with the batches of all processes, one after another; that given where there is but one process.

    A loss computed from it is the same in every process, and is that of the global batch; averaged over processes (as
    DistributedDataParallel does), its gradients are those of one process with that batch. Processes may have batches of
    different sizes.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return step
    count = torch.tensor([len(step.domains)], device=step.domains.device)
    sizes = [int(size) for size in _all_gathered(count)]
    features = None if step.features is None else _joined(step.features, sizes)
    logits, targets = _joined(step.logits, sizes), _joined(step.targets, sizes)
    return replace(step, logits=logits, targets=targets, domains=_joined(step.domains, sizes), features=features)


def _all_gathered(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor)
    return parts


def _joined(tensor: Tensor, sizes: list[int]) -> Tensor:
    """Returns the tensors of all processes along dimension 0; gradients reach the own part, times their number."""
    own = tensor.detach()
    room = own.new_zeros(max(sizes) - len(own), *own.shape[1:])
    parts = [part[:size] for part, size in zip(_all_gathered(torch.cat([own, room])), sizes, strict=True)]
    # Averaging over processes divides by their number what each contributes alone, so it is multiplied beforehand.
    if tensor.requires_grad:
        parts[distributed.get_rank()] = own + len(sizes) * (tensor - own)
    return torch.cat(parts)


@contextmanager
def classifier_inputs(model: nn.Module, num_classes: int) -> Iterator[Callable[[], Tensor]]:
    """Gives a function that returns what the classifier read [B, D] in the latest forward pass, for `Step.features`.

        with classifier_inputs(model, 7) as features:
            loss = objective(Step(model(images), labels, domains, features()))

    The classifier is the one that a timm model names (with two heads, as in distilled DeiT, their inputs stand side by
    side), otherwise the last linear layer with one output per class. Raises `InputError` if there is none, or if it has
    not read anything yet.
    """
    heads = _classifiers(model, num_classes)
    read: dict[int, Tensor] = {}

    def keep(position: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            read[position] = inputs[0].flatten(1)

        return hook

    def features() -> Tensor:
        if len(read) < len(heads):
            raise InputError("the classifier has not read anything yet; call the model first")
        return torch.cat([read.pop(position) for position in range(len(heads))], dim=1)

    handles = [head.register_forward_pre_hook(keep(position)) for position, head in enumerate(heads)]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _classifiers(model: nn.Module, num_classes: int) -> list[nn.Module]:
    """Returns the modules whose outputs are logits."""
    named_by_timm = getattr(model, "get_classifier", None)
    if callable(named_by_timm):
        heads: Any = named_by_timm()
        return list(heads) if isinstance(heads, tuple | list) else [heads]
    linear: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    if not linear:
        raise InputError(
            f"{type(model).__name__} has no linear layer of {num_classes} outputs, so its features cannot be told; "
            "use an objective that needs none, such as erm or groupdro"
        )
    return linear[-1:]
