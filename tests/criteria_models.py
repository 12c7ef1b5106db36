"""A small attention with its network written by hand, and the naive computations that scores must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.criteria import (
    logits_of,
)
from secateur.graph.network import Axis, Group, Network

Batch = tuple[Any, Tensor]
CRITERION_NAMES = (
    *("l1", "l2", "taylor", "hessian", "random", "taylor_signed", "lamp", "fpgm"),
    *("activation", "variance", "obs"),
)
NEEDS_BATCHES = ("taylor", "hessian")


def axis(tensor: str, dim: int, role: Any, channels: Sequence[int], owners: Sequence[int] | None = None) -> Axis:
    labels = np.array(channels, dtype=np.int64)
    heads = np.full(labels.shape, -1, dtype=np.int64) if owners is None else np.array(owners, dtype=np.int64)
    return Axis(tensor, dim, labels, role, owners=heads, components=np.stack([labels, heads], axis=1))


def network(num_channels: int, axes: Sequence[Axis], groups: Sequence[tuple[str, Sequence[int]]] = ()) -> Network:
    unread: dict[str, Any] = {field.name: () for field in fields(Network)}  # scoring looks at nothing else
    return Network(
        **unread
        | {
            "num_channels": num_channels,
            "axes": tuple(axes),
            "groups": tuple(Group(name, "mlp", "mlp", np.array([channels]), ()) for name, channels in groups),
        }
    )


class Attention(nn.Module):
    """Two heads of two dimensions over an embedding of three channels, a norm, dropout, and a counter of forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.qkv = nn.Linear(3, 12)
        self.drop = nn.Dropout(0.5)
        self.proj = nn.Linear(4, 3)
        self.head = nn.Linear(3, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        q, k, v = self.qkv(self.norm(x)).reshape(len(x), -1, 3, 2, 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.drop(self.proj(y))).mean(1))


def attention() -> Attention:
    model = Attention()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def attention_network() -> Network:
    """Channels 0-2: embedding; 3-6: query-key dims; 7-10: value dims; 11 and 12: the heads that own them."""
    qkv, qkv_owners = [3, 4, 5, 6, 3, 4, 5, 6, 7, 8, 9, 10], [11, 11, 12, 12] * 3
    axes = [
        axis("norm.weight", 0, "norm", [0, 1, 2]),
        axis("norm.bias", 0, "other", [0, 1, 2]),
        axis("qkv.weight", 0, "out", qkv, qkv_owners),
        axis("qkv.weight", 1, "in", [0, 1, 2]),
        axis("qkv.bias", 0, "other", qkv, qkv_owners),
        axis("proj.weight", 0, "out", [0, 1, 2]),
        axis("proj.weight", 1, "in", [7, 8, 9, 10], [11, 11, 12, 12]),
        axis("head.weight", 0, "out", [-1] * 5),
        axis("head.weight", 1, "in", [0, 1, 2]),
    ]
    return network(13, axes, [("embedding", range(3)), ("qk", range(3, 7)), ("v", range(7, 11)), ("heads", (11, 12))])


def attention_batches(sizes: Sequence[int] = (4, 3), dtype: torch.dtype = torch.float32) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(sum(sizes), 4, 3, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 5, (sum(sizes),), generator=generator)
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def naive_scores(net: Network, saliency: dict[str, np.ndarray]) -> np.ndarray:
    """Channel by channel, index by index: mean over the axes of the sum of what goes."""
    scores = np.zeros(net.num_channels)
    for channel in range(net.num_channels):
        sums = []
        for ax in net.axes:
            gone = [i for i in range(ax.channels.size) if channel in (ax.channels[i], ax.owners[i])]
            if ax.role != "other" and gone:
                sums.append(sum(np.take(saliency[ax.tensor], i, axis=ax.dim).sum() for i in gone))
        scores[channel] = np.mean(sums)
    return scores


def sample_gradients(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """One backward pass per sample, stacked: the truth that the vectorised route must equal."""
    model.eval()
    tensors = [dict(model.named_parameters())[name] for name in names]
    rows = []
    for inputs, labels in batches:
        for n in range(len(labels)):
            one = {k: v[n : n + 1] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[n : n + 1]
            output = model(**one) if isinstance(one, dict) else model(one)
            loss = F.cross_entropy(logits_of(output), labels[n : n + 1])
            rows.append(torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True))
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}
