"""Distillation: its losses by hand, teachers left alone, distilled DeiT with both heads, students that approach."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import secateur
from secateur.data import load_split
from secateur.errors import InputError
from secateur.experiments.base_models import base_model
from secateur.training.distillation import Distillation


class Says(nn.Module):
    """A teacher that says the same, with dropout to tell train from eval mode."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(self.logits)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def some(seed: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))


IMAGES = torch.zeros(4, 3, 8, 8)


# --- formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_distillation_is_the_divergence_by_hand(temperature: float) -> None:
    student, teacher = some(0), some(1)
    p, q = (softmax(z.double().numpy() / temperature) for z in (teacher, student))
    divergence = (p * np.log(p / q)).sum(axis=1).mean()
    loss = Distillation(Says(teacher), 0.3, temperature).loss(IMAGES, student, torch.tensor(2.0))
    assert loss.item() == pytest.approx(0.7 * 2.0 + 0.3 * temperature**2 * divergence, rel=1e-5)


def test_hard_distillation_takes_the_teachers_decision_for_the_label() -> None:
    student, teacher = some(0), some(1)
    decided = teacher.argmax(dim=1)
    entropy = -np.log(softmax(student.double().numpy())[np.arange(4), decided.numpy()]).mean()
    loss = Distillation(Says(teacher), 0.5, 7.0, hard=True).loss(IMAGES, student, torch.tensor(2.0))
    assert loss.item() == pytest.approx(0.5 * 2.0 + 0.5 * entropy, rel=1e-5)


@pytest.mark.parametrize("hard", [False, True])
def test_the_token_mode_teaches_the_distillation_head_alone(hard: bool) -> None:
    heads = some(0).requires_grad_(), some(1).requires_grad_()
    teacher = Says(some(2))
    distillation = Distillation(teacher, 0.5, 2.0, mode="token", hard=hard)
    expected = Distillation(teacher, 0.5, 2.0, hard=hard).loss(IMAGES, heads[1], torch.tensor(1.0))
    assert torch.equal(distillation.loss(IMAGES, heads, torch.tensor(1.0)), expected)
    assert distillation.student_logits(heads) is heads[0]
    named = {"logits": some(5), "cls_logits": heads[0], "distillation_logits": heads[1]}
    assert torch.equal(distillation.loss(IMAGES, named, torch.tensor(1.0)), expected)
    expected.backward()
    assert heads[0].grad is None
    assert heads[1].grad is not None


def test_a_student_that_agrees_pays_nothing_and_gradients_point_to_the_teacher() -> None:
    teacher = Says(some(1))
    distillation = Distillation(teacher, 1.0, 2.0)
    agreed = (some(1) + 3.0).requires_grad_()
    loss = distillation.loss(IMAGES, agreed, torch.tensor(9.0))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    student = some(0).requires_grad_()
    distillation.loss(IMAGES, student, torch.tensor(9.0)).backward()
    # d/dz [T² KL(p ‖ softmax(z / T))] = T (softmax(z / T) - p), divided by the images in a mean.
    slope = 2.0 * (softmax(some(0).double().numpy() / 2) - softmax(some(1).double().numpy() / 2)) / 4
    assert student.grad is not None
    assert np.allclose(student.grad.numpy(), slope, atol=1e-6)


def test_the_teacher_is_left_as_it_was() -> None:
    teacher = Says(some(1)).train()
    teacher.dropout.eval()
    distillation = Distillation(teacher, 1.0, 1.0)
    student = some(0).requires_grad_()
    state = torch.get_rng_state()
    losses = [distillation.loss(IMAGES, student, torch.tensor(0.0)) for _ in range(2)]
    assert losses[0] == losses[1]
    losses[0].backward()
    assert teacher.logits.grad is None
    assert teacher.training
    assert not teacher.dropout.training
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_distilled_is_refused() -> None:
    teacher = Says(some(1))
    for options, message in (((-0.1, 1.0), "alpha"), ((1.1, 1.0), "alpha"), ((0.5, 0.0), "temperature")):
        with pytest.raises(InputError, match=message):
            Distillation(teacher, *options)
    with pytest.raises(InputError, match="did you mean 'token'"):
        Distillation(teacher, 0.5, 1.0, mode="tokens")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="same classes"):
        Distillation(teacher, 0.5, 1.0).loss(IMAGES, torch.zeros(4, 3), torch.tensor(0.0))
    token = Distillation(teacher, 0.5, 1.0, mode="token")
    with pytest.raises(InputError, match="distillation head"):
        token.loss(IMAGES, some(0), torch.tensor(0.0))
    with pytest.raises(InputError, match="no distillation token"), token.prepared(base_model("vit_digits", "thick")):
        pass


# --- on digits-dg -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    split = load_split("digits-dg")
    chosen = range(0, len(split.train), 6)
    return torch.stack([split.train[i][0] for i in chosen]), split.train.labels[list(chosen)]


def apart(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """Returns how far the student's distributions are from the teacher's, in eval mode."""
    with torch.no_grad():
        p, q = (model.eval()(images).log_softmax(dim=1) for model in (teacher, student))
    return float((p.exp() * (p - q)).sum(dim=1).mean())


@pytest.mark.parametrize(("name", "mode", "hard"), [("vit_digits", "logits", False), ("deit_digits", "token", False)])
def test_a_cut_student_approaches_its_dense_model(
    digits: tuple[Tensor, Tensor], name: str, mode: str, hard: bool
) -> None:
    images, labels = digits
    teacher = base_model(name, "thick")
    student = copy.deepcopy(teacher)
    secateur.prune_(student, images[:1], criterion="l2", ratio=0.5, scope="local")
    distillation = Distillation(teacher, 0.9, 2.0, mode=mode, hard=hard)  # type: ignore[arg-type]
    before, weights = apart(student, teacher, images), copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    student.train()
    with distillation.prepared(student):
        for _ in range(8):
            outputs = student(images)
            own = cross_entropy(distillation.student_logits(outputs), labels)
            optimizer.zero_grad()
            distillation.loss(images, outputs, own).backward()
            optimizer.step()
    assert apart(student, teacher, images) < 0.7 * before
    assert all(torch.equal(value, weights[key]) for key, value in teacher.state_dict().items())
    assert isinstance(student.train()(images[:2]), Tensor)  # the switch for two heads is off again


def test_both_heads_of_a_cut_deit_learn_from_hard_labels(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    teacher, student = base_model("vit_digits", "thick"), base_model("deit_digits", "thick")
    secateur.prune_(student, images[:1], criterion="l2", ratio=0.5, scope="local")
    distillation = Distillation(teacher, 0.5, 1.0, mode="token", hard=True)
    with distillation.prepared(student.train()):
        outputs = student(images)
        own = cross_entropy(distillation.student_logits(outputs), labels)
        distillation.loss(images, outputs, own).backward()
    heads = [student.get_parameter(f"{head}.weight").grad for head in ("head", "head_dist")]
    with torch.no_grad():
        decided = teacher(images).argmax(dim=1)
    for output, target, head in zip(outputs, (labels, decided), heads, strict=True):
        assert head is not None
        assert head.abs().max() > 0
        rows = (0.5 * (output.softmax(dim=1) - torch.eye(10)[target]) / len(images)).sum(dim=0)
        bias = student.get_parameter("head.bias" if head is heads[0] else "head_dist.bias").grad
        assert bias is not None
        assert torch.allclose(bias, rows, atol=1e-6)
