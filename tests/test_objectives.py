"""Objectives against independent recomputations: explicit covariances, weights by hand, pairs looked up one by one."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import secateur
from secateur.data import load_split
from secateur.errors import InputError
from secateur.experiments.base_models import base_model
from secateur.training.objectives import (
    OBJECTIVES,
    GroupDRO,
    MixupDomains,
    Objective,
    Step,
    classifier_inputs,
    find_objective,
    gathered,
)


def a_step(*, sizes: tuple[int, ...] = (4, 5, 3), classes: int = 3, width: int = 6, seed: int = 0) -> Step:
    """Returns a step whose domains lie in mixed order, in float64, with logits and features that take gradients."""
    generator = torch.Generator().manual_seed(seed)
    domains = torch.cat([torch.full((n,), d) for d, n in enumerate(sizes)])
    domains = domains[torch.randperm(len(domains), generator=generator)]
    targets = torch.randint(classes, (len(domains),), generator=generator)
    logits = torch.randn(len(domains), classes, generator=generator, dtype=torch.float64).requires_grad_()
    features = torch.randn(len(domains), width, generator=generator).requires_grad_()
    return Step(logits, targets, domains, features)


def entropies(step: Step) -> np.ndarray:
    """Returns -log p(target) of each image, by hand."""
    logits = step.logits.detach().numpy()
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return -np.log(p[np.arange(len(p)), step.targets.numpy()])


# --- ERM --------------------------------------------------------------------------------------------------------


def test_erm_is_the_mean_over_all_images() -> None:
    step = a_step()
    assert find_objective("erm", num_classes=3)(step).item() == pytest.approx(entropies(step).mean(), rel=1e-12)


def test_erm_gives_the_very_loss_that_plain_training_has() -> None:
    step = a_step()
    smoothed = find_objective("erm", num_classes=3, label_smoothing=0.1)(step)
    assert torch.equal(smoothed, cross_entropy(step.logits, step.targets, label_smoothing=0.1))


def test_targets_given_as_probabilities_are_not_smoothed_once_more() -> None:
    step = a_step()
    soft = torch.eye(3, dtype=torch.float64)[step.targets] * 0.9 + 0.1 / 3
    given = Step(step.logits, soft, step.domains)
    smoothed = find_objective("erm", num_classes=3, label_smoothing=0.1)
    assert smoothed(given).item() == pytest.approx(smoothed(step).item(), rel=1e-12)


# --- CORAL ------------------------------------------------------------------------------------------------------


def test_coral_adds_the_distances_of_means_and_explicit_covariances() -> None:
    step = a_step()
    assert step.features is not None
    features, domains = step.features.detach().double().numpy(), step.domains.numpy()
    means = [entropies(step)[domains == d].mean() for d in range(3)]
    distances = []
    for i, j in itertools.combinations(range(3), 2):
        a, b = features[domains == i], features[domains == j]
        spread = np.cov(a, rowvar=False) - np.cov(b, rowvar=False)
        distances.append(np.mean((a.mean(0) - b.mean(0)) ** 2) + np.mean(spread**2))
    loss = find_objective("coral", num_classes=3, weight=0.7)(step)
    assert loss.item() == pytest.approx(np.mean(means) + 0.7 * np.mean(distances), rel=1e-6)


def test_corals_penalty_reaches_the_features_and_falls_along_its_gradient() -> None:
    step = a_step()
    assert step.features is not None
    objective = find_objective("coral", num_classes=3)
    loss = objective(step)
    (slope,) = torch.autograd.grad(loss, step.features)
    moved = Step(step.logits, step.targets, step.domains, (step.features - 0.5 * slope).detach())
    assert slope.abs().sum() > 0
    assert objective(moved) < loss


def test_coral_leaves_out_domains_with_a_single_image() -> None:
    with_a_single = a_step(sizes=(4, 5, 1))
    pair = with_a_single.domains != 2
    features = with_a_single.features
    assert features is not None
    two = Step(with_a_single.logits[pair], with_a_single.targets[pair], with_a_single.domains[pair], features[pair])
    free = find_objective("coral", num_classes=3, weight=0.0)
    coral = find_objective("coral", num_classes=3)
    assert (coral(with_a_single) - free(with_a_single)).item() == pytest.approx((coral(two) - free(two)).item())


def test_coral_of_a_single_domain_is_its_cross_entropy() -> None:
    step = a_step(sizes=(6,))
    assert find_objective("coral", num_classes=3)(step).item() == pytest.approx(entropies(step).mean())


def test_coral_says_that_it_needs_features() -> None:
    step = a_step()
    objective = find_objective("coral", num_classes=3)
    assert objective.needs_features
    with pytest.raises(InputError, match="classifier_inputs"):
        objective(Step(step.logits, step.targets, step.domains))


# --- GroupDRO ---------------------------------------------------------------------------------------------------


def test_groupdro_follows_the_algorithm_by_hand() -> None:
    objective = find_objective("groupdro", num_classes=3, eta=0.5)
    q = [1 / 3] * 3
    for seed in range(4):
        step = a_step(seed=seed)
        means = [entropies(step)[step.domains.numpy() == d].mean() for d in range(3)]
        q = [weight * math.exp(0.5 * mean) for weight, mean in zip(q, means, strict=True)]
        q = [weight / sum(q) for weight in q]
        expected = sum(weight * mean for weight, mean in zip(q, means, strict=True))
        assert objective(step).item() == pytest.approx(expected, rel=1e-9)
    assert isinstance(objective, GroupDRO)
    assert objective.q.tolist() == pytest.approx(q, rel=1e-9)
    assert not objective.state_dict()["log_q"].requires_grad


def test_groupdro_leaves_a_domain_alone_that_the_batch_lacks() -> None:
    objective = GroupDRO(num_classes=3, eta=1.0)
    objective(a_step())
    before = objective.log_q.clone()
    step = a_step(seed=1)
    there = step.domains != 1
    loss = objective(Step(step.logits[there], step.targets[there], step.domains[there]))
    assert objective.log_q[1] == before[1]
    assert (objective.log_q[[0, 2]] > before[[0, 2]]).all()
    means = torch.tensor([entropies(step)[step.domains.numpy() == d].mean() for d in (0, 2)])
    assert loss.item() == pytest.approx(float(means @ objective.q[[0, 2]]), rel=1e-9)


def test_groupdro_resumes_exactly() -> None:
    whole, cut = (find_objective("groupdro", num_classes=3, eta=0.3) for _ in range(2))
    for seed in range(3):
        whole(a_step(seed=seed))
        cut(a_step(seed=seed))
    resumed = find_objective("groupdro", num_classes=3, eta=0.3)
    resumed.load_state_dict(cut.state_dict())
    assert torch.equal(resumed(a_step(seed=3)), whole(a_step(seed=3)))


# --- mixup across domains ---------------------------------------------------------------------------------------


def pictures(domains: Tensor) -> Tensor:
    """Returns an image for each entry whose pixels all hold ten to the power of its position."""
    return (10.0 ** torch.arange(len(domains)).double()).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()


def test_mixup_pairs_every_image_with_one_of_the_next_domain_on_a_circle() -> None:
    domains = torch.tensor([2, 0, 1, 1, 0, 2])
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    objective = MixupDomains(num_classes=3, alpha=1.0)
    circles = set()
    for _ in range(20):
        images, soft = objective.mix(pictures(domains), targets, domains)
        succession = {}
        for position in range(6):
            partners = [
                (other, share)
                for other in range(6)
                for share in [(images[position, 0, 0, 0] - 10.0**other) / (10.0**position - 10.0**other)]
                if domains[other] != domains[position] and 0 <= share <= 1
                # Both image and target must be explained by the one partner.
                if torch.allclose(
                    soft[position].double(),
                    share * torch.eye(3).double()[targets[position]] + (1 - share) * torch.eye(3)[targets[other]],
                    atol=1e-6,
                )
            ]
            assert len(partners) >= 1
            succession.setdefault(int(domains[position]), set()).update(int(domains[o]) for o, _ in partners)
        circles.add(tuple(sorted((k, min(v)) for k, v in succession.items())))
        assert torch.allclose(soft.sum(dim=1), torch.ones(6))
    assert len(circles) > 1


def test_mixup_uses_images_of_a_smaller_domain_again() -> None:
    domains = torch.tensor([0, 0, 0, 1])
    images, soft = MixupDomains(num_classes=4).mix(pictures(domains), torch.arange(4), domains)
    assert (soft[:3, 3] > 0).all()
    assert (images[:3, 0, 0, 0] > pictures(domains)[:3, 0, 0, 0]).all()


def test_mixups_loss_is_the_mixture_of_two_cross_entropies() -> None:
    torch.manual_seed(3)
    domains, labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 0])
    objective = MixupDomains(num_classes=3, label_smoothing=0.2)
    _, soft = objective.mix(torch.zeros(4, 3, 2, 2), labels, domains)
    share = (soft[:, :] - 0.2 / 3) / 0.8
    logits = torch.randn(4, 3)
    partner = torch.tensor([2, 3, 0, 1])
    own = torch.stack([share[i, labels[i]] if labels[i] != labels[partner[i]] else torch.tensor(1.0) for i in range(4)])
    first = cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)
    second = cross_entropy(logits, labels[partner], reduction="none", label_smoothing=0.2)
    expected = (own * first + (1 - own) * second).mean()
    assert objective(Step(logits, soft, domains)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_mixup_leaves_a_single_domain_as_it_is() -> None:
    domains = torch.zeros(3, dtype=torch.int64)
    images, soft = MixupDomains(num_classes=3).mix(pictures(domains), torch.arange(3), domains)
    assert torch.allclose(images, pictures(domains))
    assert torch.allclose(soft, torch.eye(3))


def test_mixup_draws_from_torchs_generator_alone() -> None:
    domains = torch.tensor([0, 1, 2, 0, 1, 2])
    objective = MixupDomains(num_classes=3)
    state = torch.get_rng_state()
    first = objective.mix(pictures(domains), torch.arange(6) % 3, domains)
    np.random.seed(77)
    torch.set_rng_state(state)
    second = objective.mix(pictures(domains), torch.arange(6) % 3, domains)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", ["erm", "coral", "groupdro"])
def test_other_objectives_leave_images_as_they_are(name: str) -> None:
    images, targets = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    mixed, same = find_objective(name, num_classes=2).mix(images, targets, torch.tensor([0, 1]))
    assert mixed is images
    assert same is targets


# --- names and values -------------------------------------------------------------------------------------------


def test_names_options_and_values_are_checked() -> None:
    for name in OBJECTIVES:
        assert isinstance(find_objective(name, num_classes=3), Objective)
    with pytest.raises(InputError, match="did you mean 'coral'"):
        find_objective("corla", num_classes=3)
    with pytest.raises(InputError, match="option of the objective erm 'eta'"):
        find_objective("erm", num_classes=3, eta=0.1)
    for name, option, value in (("coral", "weight", -1), ("groupdro", "eta", -0.1), ("mixup_domains", "alpha", 0)):
        with pytest.raises(InputError, match=option):
            find_objective(name, num_classes=3, **{option: value})
    with pytest.raises(InputError, match="label_smoothing"):
        find_objective("erm", num_classes=3, label_smoothing=1.0)
    with pytest.raises(InputError, match="log_q"):
        find_objective("groupdro", num_classes=3).load_state_dict({})


# --- several processes ------------------------------------------------------------------------------------------


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    return images, torch.arange(9) % 3, torch.tensor([0, 0, 1, 1, 0, 2, 1, 2, 0])


def _gradients(model: nn.Module, objective: Objective, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    images, labels, domains = batch
    for _ in range(2):  # the second step sees what the first has left in GroupDRO's weights
        model.zero_grad()
        with classifier_inputs(model, 3) as features:
            logits = model(images)
            objective(Step(logits, labels, domains, features())).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    part = slice(0, 5) if rank == 0 else slice(5, 9)
    images, labels, domains = _batch()
    for name in ("coral", "groupdro"):
        found = _gradients(_model(), find_objective(name, num_classes=3), (images[part], labels[part], domains[part]))
        torch.distributed.all_reduce(found)
        torch.save(found / 2, f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_with_the_global_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    for name in ("coral", "groupdro"):
        alone = _gradients(_model(), find_objective(name, num_classes=3), _batch())
        for rank in range(2):
            assert torch.allclose(torch.load(tmp_path / f"{name}-{rank}.pt"), alone, rtol=1e-6, atol=1e-9)


def test_one_process_gathers_nothing() -> None:
    step = a_step()
    assert gathered(step) is step


# --- on digits-dg -----------------------------------------------------------------------------------------------


def test_the_classifiers_inputs_are_what_its_weights_multiply() -> None:
    images = torch.randn(4, 3, 32, 32)
    model = base_model("vit_digits", "thick")
    with classifier_inputs(model, 10) as features:
        logits = model(images)
        found = features()
        with pytest.raises(InputError, match="call the model first"):
            features()
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    assert torch.allclose(found @ head.weight.T + head.bias, logits, atol=1e-5)
    assert not head._forward_pre_hooks
    distilled = base_model("deit_digits", "thick")
    with classifier_inputs(distilled, 10) as features:
        distilled(images)
        assert features().shape == (4, 192)
    with pytest.raises(InputError, match="no linear layer of 7 outputs"), classifier_inputs(nn.Linear(3, 4), 7):
        pass


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_trains_a_dense_and_a_cut_model(name: str) -> None:
    split = load_split("digits-dg")
    names = {domain: number for number, domain in enumerate(split.domains)}
    order = torch.randperm(len(split.train), generator=torch.Generator().manual_seed(0))[:192].tolist()
    images = torch.stack([split.train[i][0] for i in order])
    labels = torch.tensor([split.train[i][1] for i in order])
    domains = torch.tensor([names[split.train.domains[i]] for i in order])
    dense = base_model("vit_digits", "thick")
    model = base_model("vit_digits", "thick")
    secateur.prune_(model, images[:1], criterion="l2", ratio=0.5, scope="local")
    for trained, steps in ((dense, 1), (model, 8)):
        objective = find_objective(name, num_classes=10)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        losses = []
        for _ in range(steps):
            mixed, targets = objective.mix(images, labels, domains)
            with classifier_inputs(trained, 10) as features:
                logits = trained(mixed)
                loss = objective(Step(logits, targets, domains, features()))
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in trained.parameters())
            optimizer.step()
            losses.append(loss.item())
        if steps > 1:
            assert losses[-1] < losses[0]
