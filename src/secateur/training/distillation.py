"""Distillation: a student learns what a teacher, such as the dense model that it was cut from, says of each image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from secateur.errors import InputError, unknown_name
from secateur.training.batches import logits_of, mode_kept

Mode = Literal["logits", "token"]


class Distillation:
    """The loss (1 - alpha) · student + alpha · D(student, teacher), with images as the student sees them.

    D with `hard=False` compares whole distributions (Hinton et al., arXiv 1503.02531; equation 2 of DeiT, arXiv
    2012.12877), and with `hard=True` takes the teacher's decision for the label (equation 3 of DeiT, there alpha 1/2):

        soft   D = T² · KL( softmax(z_teacher / T) ‖ softmax(z_student / T) ), mean over images, in nats
        hard   D = CE( z_student, argmax z_teacher )

    z_student is the student's logits in the mode `logits`; in the mode `token` it is those of the distillation head of
    a distilled DeiT, whose class head alone then gets the student's own loss. (DeiT's released code divides the soft D
    by the number of classes as well; the paper does not, and neither does this.)

        distillation = Distillation(teacher, alpha=0.5, temperature=1.0, mode="token", hard=True)
        with distillation.prepared(student):
            outputs = student(images)
            own = cross_entropy(distillation.student_logits(outputs), labels)
            loss = distillation.loss(images, outputs, own)
    """

    def __init__(
        self, teacher: nn.Module, alpha: float, temperature: float, mode: Mode = "logits", *, hard: bool = False
    ) -> None:
        """Takes the teacher, which must be on the device of the images, runs in eval mode and is left as it was found.

        Raises `InputError` for an unknown mode, alpha outside [0, 1] or a temperature that is not positive.
        """
        if not 0.0 <= alpha <= 1.0:
            raise InputError(f"alpha must be in [0, 1], found {alpha}")
        if not temperature > 0.0:
            raise InputError(f"temperature must be positive, found {temperature}")
        if mode not in ("logits", "token"):
            raise unknown_name("mode of distillation", str(mode), ("logits", "token"))
        self.teacher, self.alpha, self.temperature, self.mode, self.hard = teacher, alpha, temperature, mode, hard

    @contextmanager
    def prepared(self, student: nn.Module) -> Iterator[None]:
        """Makes a student of timm give the outputs of both heads while it trains, as the mode `token` needs.

        Nothing is done in the mode `logits`, nor to a model of Hugging Face, which gives both at all times. Raises
        `InputError` for a timm model without a distillation head.
        """
        switch = getattr(student, "set_distilled_training", None)
        if self.mode == "token" and switch is None and hasattr(student, "get_classifier"):
            raise InputError(
                f"{type(student).__name__} has no distillation token; use mode 'logits', or a model such as timm's "
                "deit_base_distilled_patch16_224"
            )
        if self.mode == "logits" or switch is None:
            yield
            return
        before = student.distilled_training
        switch(True)
        try:
            yield
        finally:
            switch(before)

    def student_logits(self, outputs: object) -> Tensor:
        """Returns the logits [B, C] for the student's own loss: the mean of all heads, or the class head's alone."""
        return logits_of(outputs) if self.mode == "logits" else _heads(outputs)[0]

    def loss(self, images: Tensor, outputs: object, student_loss: Tensor) -> Tensor:
        """Returns the loss (scalar) from the student's outputs for `images` and its own loss.

        Raises `InputError` where teacher and student disagree about the number of classes, or the outputs are not those
        of a model with two heads in the mode `token`.
        """
        logits = (logits_of(outputs) if self.mode == "logits" else _heads(outputs)[1]).float()
        with torch.no_grad(), mode_kept(self.teacher):
            taught = logits_of(self.teacher.eval()(images)).detach().float()
        if taught.shape != logits.shape:
            raise InputError(
                f"the teacher gives logits of {tuple(taught.shape)}, the student of {tuple(logits.shape)}; "
                "distillation needs the same classes in both"
            )
        return (1 - self.alpha) * student_loss + self.alpha * self._distance(logits, taught)

    def _distance(self, logits: Tensor, taught: Tensor) -> Tensor:
        """Returns D of the class's docstring for the student's and the teacher's logits [B, C]."""
        if self.hard:
            return cross_entropy(logits, taught.argmax(dim=1))
        own, other = (logits / self.temperature).log_softmax(dim=1), (taught / self.temperature).log_softmax(dim=1)
        return self.temperature**2 * kl_div(own, other, reduction="batchmean", log_target=True)


def _heads(outputs: object) -> tuple[Tensor, Tensor]:
    """Returns the logits of the class head and of the distillation head."""
    pair: Any = outputs
    if isinstance(outputs, Mapping):
        pair = (outputs.get("cls_logits"), outputs.get("distillation_logits"))
    if isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(o, Tensor) for o in pair):
        return pair[0], pair[1]
    raise InputError(
        f"mode 'token' needs the logits of a class head and a distillation head, found {type(outputs).__name__}; train "
        "the student inside Distillation.prepared, and in training mode, or use mode 'logits'"
    )
