"""Parameter groups for an optimizer: which weights decay, and learning rates that shrink towards the input."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from secateur.errors import InputError


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Returns the trainable parameters in groups with `params`, `lr` and `weight_decay`, for any torch optimizer.

    One-dimensional parameters (norms, biases, scales) do not decay. With `layer_decay` below 1 a parameter of layer i
    of n learns with lr · layer_decay^(n - 1 - i), as in BEiT (arXiv 2106.08254): the head with `lr` itself, the blocks
    before it with less and less, the patch embedding with least. Layers of a timm model are those that it names itself
    (by timm's `param_groups_layer_decay`); those of any other model are what comes before its outermost blocks, each of
    these, and what comes after, in the order in which the model defines them. In a model that has been cut, blocks of
    which nothing is left do not count.

    Raises `InputError` for values out of range, for a model with nothing to train, and, with `layer_decay` below 1, for
    one in which no blocks are found.
    """
    if not 0.0 < lr < math.inf:
        raise InputError(f"lr must be positive, found {lr}")
    if not 0.0 <= weight_decay < math.inf:
        raise InputError(f"weight_decay must be 0 or more, found {weight_decay}")
    if not 0.0 < layer_decay <= 1.0:
        raise InputError(f"layer_decay must be in (0, 1], found {layer_decay}")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("the model has no trainable parameters; set requires_grad on those to be fine-tuned")
    if layer_decay < 1.0 and hasattr(model, "group_matcher"):
        from timm.optim import param_groups_layer_decay

        scaled = param_groups_layer_decay(model, weight_decay, layer_decay=layer_decay)
        return [{"params": g["params"], "lr": lr * g["lr_scale"], "weight_decay": g["weight_decay"]} for g in scaled]
    layers = _layers(model) if layer_decay < 1.0 else {}
    last = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, decays = layers.get(name, last), parameter.ndim > 1
            rate, decay = lr * layer_decay ** (last - layer), weight_decay if decays else 0.0
            group = groups.setdefault((layer, decays), {"params": [], "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())


def _layers(model: nn.Module) -> dict[str, int]:
    """Returns the layer of each parameter by name: 0 before the first block, 1 … in the blocks, one more after them."""
    blocks = list(repeated_blocks(model))
    if not blocks:
        raise InputError(
            f"no repeated blocks were found in {type(model).__name__}, so its layers cannot be told apart; use "
            "layer_decay=1.0"
        )
    found: dict[str, int] = {}
    latest = 0
    for name, _ in model.named_parameters():
        block = next((number for number, prefix in enumerate(blocks, start=1) if name.startswith(f"{prefix}.")), None)
        latest = block or (len(blocks) + 1 if latest >= len(blocks) else latest)
        found[name] = latest
    return found


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the outermost repeated blocks by name: members, all of one class, of lists and sequences in the model.

    Members without parameters do not count.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(f"{name}.".startswith(f"{b}.") for b in blocks):
            continue
        members = {key: child for key, child in module.named_children() if any(True for _ in child.parameters())}
        if len(members) > 1 and len({type(child) for child in members.values()}) == 1:
            blocks |= {f"{name}.{key}" if name else key: child for key, child in members.items()}
    return blocks
