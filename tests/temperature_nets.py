"""Attentions whose temperature follows their width, and whose queries serve for something else as well."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from nets import TOKENS, Net, net


def _layers(names: str = "qkv") -> dict[str, object]:
    layers = {name: nn.Linear(6, 16) for name in names}
    return {**layers, "out": nn.Linear(16, 3), "heads": 4, "head_dim": 4}


def _heads(m: Net, x: Tensor, *layers: nn.Module) -> list[Tensor]:
    return [f(x).view(*x.shape[:2], m.heads, m.head_dim).transpose(1, 2) for f in layers or (m.q, m.k, m.v)]


def _out(m: Net, heads: Tensor) -> Tensor:
    return m.out(heads.transpose(1, 2).flatten(2))


@net((TOKENS,), lambda: _layers("qv"), {"q:heads": 4})
def queries_are_keys(m: Net, x: Tensor) -> Tensor:
    q, v = _heads(m, x, m.q, m.v)
    return _out(m, (q @ q.mT / math.sqrt(m.head_dim)).softmax(-1) @ v)


@net((TOKENS,), lambda: _layers("qv"), {"q:heads": 4})
def queries_are_keys_of_fused_attention(m: Net, x: Tensor) -> Tensor:
    q, v = _heads(m, x, m.q, m.v)
    return _out(m, F.scaled_dot_product_attention(q, q, v))


@net((TOKENS,), _layers, {"q:heads": 4})
def queries_are_added_to_the_result(m: Net, x: Tensor) -> Tensor:
    q, k, v = _heads(m, x)
    return _out(m, F.scaled_dot_product_attention(q, k, v) + q)


@net((TOKENS,), _layers, {"q:heads": 4})
def queries_of_two_attentions(m: Net, x: Tensor) -> Tensor:
    q, k, v = _heads(m, x)
    return _out(m, F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, v, k))


@net((TOKENS,), _layers, {"q:heads": 4, "q:dims.qk": 16, "v:dims.v": 16})
def unflattened_heads(m: Net, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (m.heads, m.head_dim)).transpose(1, 2) for f in (m.q, m.k, m.v))
    return _out(m, (q @ k.mT / math.sqrt(m.head_dim)).softmax(-1) @ v)
