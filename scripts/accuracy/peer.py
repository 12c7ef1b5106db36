"""Torch-Pruning 1.6.1, driven as its own example for timm's ViT drives it, at a given number of MACs.

As there: widths go at one ratio, and so do whole heads, or dimensions of all heads; the classifier's outputs stay;
first and second order importance come from the calibration batches in eval mode, the latter sample by sample. Its ratio
is searched so that the pruned model's MACs (counted by `secateur.trace`, the same way for both libraries) come as close
under the budget as its rounding allows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

import secateur
from accuracy.records import Setting

Batches = Sequence[tuple[Tensor, Tensor]]

CRITERIA = ("l1", "l2", "taylor", "hessian", "lamp", "fpgm", "random")
SCOPES = ("local", "global", "isomorphic")
STEPS = 10
"""Halvings in the search for the ratio: its last step is a thousandth."""


def importance(criterion: str) -> Any:
    """Returns the peer's own object for a criterion."""
    made: dict[str, Any] = {
        "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
        "lamp": lambda: tp.importance.LAMPImportance(p=2),
        "fpgm": lambda: tp.importance.FPGMImportance(p=2),
        "random": tp.importance.RandomImportance,
    }
    return made[criterion]()


def attentions(model: nn.Module) -> dict[Any, nn.Linear]:
    """Returns the attention modules that have a fused layer of queries, keys and values, with that layer."""
    found: dict[Any, nn.Linear] = {}
    for module in model.modules():
        qkv = getattr(module, "qkv", None)
        if isinstance(qkv, nn.Linear) and isinstance(getattr(module, "num_heads", None), int):
            found[module] = qkv
    return found


def accumulate(model: nn.Module, chosen: Any, criterion: str, batches: Batches) -> None:
    """Leaves in the model, or in the importance, the gradients that a criterion reads."""
    model.eval()
    model.zero_grad()
    for images, labels in batches:
        if criterion == "taylor":
            F.cross_entropy(logits(model(images)), labels).backward()
        elif criterion == "hessian":
            for loss in F.cross_entropy(logits(model(images)), labels, reduction="none"):
                model.zero_grad()
                loss.backward(retain_graph=True)
                chosen.accumulate_grad(model)


def logits(output: Any) -> Tensor:
    return torch.stack(output).mean(0) if isinstance(output, tuple) else output


def scored(base: nn.Module, criterion: str, batches: Batches) -> tuple[nn.Module, Any]:
    """Returns a copy of `base` that holds what the criterion reads, and the peer's object for the criterion."""
    model = copy.deepcopy(base).requires_grad_()
    chosen = importance(criterion)
    accumulate(model, chosen, criterion, batches)
    return model, chosen


def pruned(
    prepared: tuple[nn.Module, Any], scope: str, attention: str, ratio: float, image: Tensor, seed: int
) -> nn.Module:
    """Returns a copy of a prepared model from which the peer removed `ratio` of all widths and of `heads` or `dims`."""
    torch.manual_seed(seed)
    model, chosen = copy.deepcopy(prepared)
    for copied, original in zip(model.parameters(), prepared[0].parameters(), strict=True):
        copied.grad = original.grad
    found = attentions(model)
    num_heads: dict[nn.Module, int] = {qkv: module.num_heads for module, qkv in found.items()}
    classifiers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.num_classes]
    pruner = tp.pruner.BasePruner(
        model,
        image,
        importance=chosen,
        global_pruning=scope != "local",
        isomorphic=scope == "isomorphic",
        pruning_ratio=ratio,
        ignored_layers=classifiers,
        num_heads=num_heads,
        prune_num_heads=attention == "heads",
        prune_head_dims=attention == "dims",
        head_pruning_ratio=ratio if attention == "heads" else 0.0,
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    for module, qkv in found.items():
        module.num_heads = num_heads[qkv]
        module.head_dim = qkv.out_features // (3 * module.num_heads)
        module.attn_dim = module.num_heads * module.head_dim
    model.zero_grad()
    with torch.no_grad():
        model(image)
    return model


def at_budget(
    prepared: tuple[nn.Module, Any], setting: Setting, macs: int, image: Tensor, seed: int
) -> tuple[nn.Module, int] | None:
    """Returns the largest of the peer's cuts of a prepared model (see `scored`) within `macs`, and its MACs.

    None if no ratio gets there.

    A ratio whose model does not run is passed over, as a user would.
    """
    low, high = 0.0, 1.0
    best: tuple[nn.Module, int] | None = None
    for _ in range(STEPS):
        ratio = (low + high) / 2
        try:
            model = pruned(prepared, setting.scope, setting.attention, ratio, image, seed)
            left = secateur.trace(model, image).macs
        except Exception:  # noqa: BLE001  (whatever the peer raises: no model at this ratio; less is pruned next)
            high = ratio
            continue
        if left > macs:
            low = ratio
        else:
            high = ratio
            if best is None or left > best[1]:
                best = model, left
    return best
