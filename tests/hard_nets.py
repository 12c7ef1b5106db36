"""Networks on tokens that compute with more than their modules show, or give back more than one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nets import TOKENS, Net, around, net, weights

Tensor = torch.Tensor
STREAM = {"stem": 16}


# what modules do not show


@net((TOKENS,), lambda: {"w": nn.ParameterList([weights(6, 9), weights(9, 8)]), "b": nn.Linear(8, 3)}, {"w": 17})
def parameter_list(m: Net, x: Tensor) -> Tensor:
    for weight in m.w:
        x = F.gelu(x @ weight)
    return m.b(x)


@net(
    (TOKENS,),
    lambda: {"w": nn.ParameterDict({"up": weights(6, 9), "shift": weights(9), "down": weights(9, 3)})},
    {"w": 9},
)
def parameter_dict(m: Net, x: Tensor) -> Tensor:
    return F.gelu(x @ m.w["up"] + m.w["shift"]) @ m.w["down"]


@net((TOKENS,), lambda: {"up": weights(6, 2, 8), "down": weights(2, 8, 3)}, {"up": 10})
def einsum_weights(m: Net, x: Tensor) -> Tensor:
    return torch.einsum("bthd,hde->bte", F.gelu(torch.einsum("btc,chd->bthd", x, m.up)), m.down)


@net((TOKENS,), lambda: {"w": weights(12, 6), "b": nn.Linear(8, 3), "c": nn.Linear(4, 3), "n": 8}, {"w": 12})
def linear_on_slices(m: Net, x: Tensor) -> Tensor:
    return m.b(F.relu(F.linear(x, m.w[: m.n]))) + m.c(F.relu(F.linear(x, m.w[m.n :])))


@net((TOKENS,), lambda: {"w": weights(27, 6), "out": nn.Linear(9, 3)}, {"w": 18})
def linear_on_chunks(m: Net, x: Tensor) -> Tensor:
    q, k, v = m.w.chunk(3)
    scores = F.linear(x, q) @ F.linear(x, k).mT * 0.3
    return m.out(scores.softmax(-1) @ F.linear(x, v))


@net(
    (TOKENS,),
    lambda: {"a": nn.Linear(6, 9), "b": nn.Linear(6, 5), "f": nn.Bilinear(9, 5, 4), "c": nn.Linear(4, 3)},
    {"a": 9, "b": 5, "f": 4},
)
def bilinear(m: Net, x: Tensor) -> Tensor:
    return m.c(F.relu(m.f(F.relu(m.a(x)), F.relu(m.b(x)))))


@net(
    ((2, 5),),
    lambda: {"words": nn.Embedding(11, 8), "places": nn.Embedding(5, 8), "b": nn.Linear(8, 8)},
    {"b": 8},
    ids=11,
)
def tied_embedding(m: Net, ids: Tensor) -> Tensor:
    x = m.words(ids) + m.places(torch.arange(ids.shape[1], device=ids.device))
    return F.relu(m.b(x)) @ m.words.weight.t()


@net(((2, 5),), lambda: {"bag": nn.EmbeddingBag(11, 8, mode="sum"), "b": nn.Linear(8, 3)}, {"bag": 8}, ids=11)
def embedding_bag(m: Net, ids: Tensor) -> Tensor:
    return m.b(F.relu(m.bag(ids)))


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


@net((TOKENS,), lambda: {"a": nn.Linear(6, 9), "b": nn.Linear(9, 3)}, {"a": 9})
def autograd_function(m: Net, x: Tensor) -> Tensor:
    return m.b(_Swish.apply(m.a(x)))


@net((TOKENS,), lambda: {"a": nn.Linear(6, 24), "b": nn.Linear(8, 3), "pieces": 3}, {"a:heads": 8})
def maxout(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y.view(*y.shape[:-1], y.shape[-1] // m.pieces, m.pieces).max(-1).values)


@net((TOKENS,), lambda: {"a": nn.Linear(6, 9), "f": nn.LayerNorm([5, 9]), "b": nn.Linear(9, 3)}, {"a": 9})
def layer_norm_over_tokens_and_channels(m: Net, x: Tensor) -> Tensor:
    return m.b(m.f(F.gelu(m.a(x))))


@dataclass
class _Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    loss: Tensor | None = None


def _two_heads() -> dict[str, object]:
    return {"a": nn.Linear(6, 9), "b": nn.Linear(9, 3), "c": nn.Linear(9, 7), "d": nn.Linear(7, 4)}


@net((TOKENS,), _two_heads, {"a": 9, "c": 7})
def tuple_output(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    x = F.relu(m.a(x))
    return m.b(x), m.d(F.relu(m.c(x)))


@net((TOKENS, TOKENS), _two_heads, {"a": 9, "c": 7})
def dict_output(m: Net, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    x, y = F.relu(m.a(x)), F.relu(m.a(y))
    return {"left": m.b(x - y), "right": m.d(F.relu(m.c(y)))}


@net((TOKENS,), _two_heads, {"b": 3, "c": 7})
def dataclass_output(m: Net, x: Tensor) -> _Output:
    x = F.relu(m.a(x))
    return _Output(m.d(F.relu(m.c(x))) + m.b(x).sum(-1, keepdim=True), (x,))


@net((TOKENS,), lambda: {"a": nn.Linear(6, 16), "b": nn.Linear(5, 3), "c": nn.Linear(11, 3), "n": 5}, {"a": 16})
def uneven_split_by_attributes(m: Net, x: Tensor) -> Tensor:
    left, right = m.a(x).split([m.n, m.a.out_features - m.n], -1)
    return m.b(F.relu(left)) + m.c(F.relu(right))


@net(
    (TOKENS,), lambda: {"a": nn.Linear(6, 16), "b": nn.Linear(5, 3), "c": nn.Linear(11, 3), "sizes": (5, 11)}, {"a": 16}
)
def uneven_split_by_a_list(m: Net, x: Tensor) -> Tensor:
    left, right = m.a(x).split(m.sizes, -1)
    return m.b(F.relu(left)) + m.c(F.relu(right))


@net((TOKENS,), lambda: {"a": nn.Linear(6, 10), "b": nn.Linear(4, 3), "c": nn.Linear(2, 3)}, {})
def uneven_chunks(m: Net, x: Tensor) -> Tensor:
    first, second, third = m.a(x).chunk(3, -1)
    return m.b(first * second) + m.c(third)


@net(
    (TOKENS,),
    lambda: {"a": nn.Linear(6, 16), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8), "d": nn.Linear(16, 3)},
    {"a": 16},
)
def coupling(m: Net, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, -1)
    left = left + F.relu(m.b(right))
    right = right * m.c(left).tanh()
    return m.d(torch.cat([left, right], -1))


@net((TOKENS,), lambda: around(nn.Linear(16, 16)), STREAM)
def in_place(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x).relu_()
    y = m.layer(x)
    y += x
    return m.head(y.mul_(0.5).add_(1))


@net((TOKENS,), lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(40, 3)}, {"a": 8})
def flattened_tokens(m: Net, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)).flatten().view(x.shape[0], -1))


@net(
    (TOKENS,),
    lambda: {"tokens": nn.Linear(5, 12), "back": nn.Linear(12, 5), **around(nn.Linear(16, 16))},
    {"tokens": 12, "stem": 16},
)
def token_mixing(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(x + m.back(F.gelu(m.tokens(x.transpose(1, 2)))).transpose(1, 2) + m.layer(x))


@net(
    (TOKENS,),
    lambda: around(nn.Linear(16, 16), down=nn.Linear(16, 4, bias=False), up=nn.Linear(4, 16, bias=False)),
    {"stem": 16, "layer": 16, "down": 4},
)
def low_rank_adapter(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(F.relu(m.layer(x) + m.up(m.down(x))))


@net(
    (TOKENS,),
    lambda: {
        "a": nn.Linear(6, 12),
        "f": nn.Conv1d(12, 12, 3, padding=1, groups=12),
        "gate": nn.Linear(6, 12),
        "b": nn.Linear(12, 3),
    },
    {"a": 12},
)
def gated_convolution(m: Net, x: Tensor) -> Tensor:
    y = m.f(m.a(x).transpose(1, 2)).transpose(1, 2)
    return m.b(F.silu(y) * m.gate(x).sigmoid())


class SoftMixture(nn.Module):
    """Experts in one weight, mixed by a softmax gate."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, experts)
        self.up, self.down = weights(experts, dim, hidden), weights(experts, hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("btc,ech->bteh", x, self.up))
        return torch.einsum("bteh,ehc,bte->btc", hidden, self.down, self.gate(x).softmax(-1))

    def without(self, removed: dict[tuple[str, int], list[int]]) -> None:
        """Shuts the gates of absent experts."""
        with torch.no_grad():
            self.gate.bias[removed.get(("gate.bias", 0), [])] = -math.inf


@net((TOKENS,), lambda: around(SoftMixture(16, 5, 3)), {"stem": 16, "layer": 24})
def mixture_in_one_weight(m: Net, x: Tensor) -> Tensor:
    return m.head(m.layer(m.stem(x)))


@net(
    (TOKENS,),
    lambda: {
        "gate": nn.Linear(6, 3),
        "experts": nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)) for _ in range(3)),
    },
    {"experts.0.0": 7, "experts.1.0": 7, "experts.2.0": 7},
)
def mixture_of_modules(m: Net, x: Tensor) -> Tensor:
    shares = m.gate(x).softmax(-1)
    return (torch.stack([e(x) for e in m.experts], -1) * shares[:, :, None]).sum(-1)


@net((TOKENS,), lambda: {"a": nn.Linear(6, 9), "b": weights(4, 9)}, {"a": 9})
def cosine_classifier(m: Net, x: Tensor) -> Tensor:
    return F.linear(F.normalize(F.relu(m.a(x)), dim=-1), F.normalize(m.b, dim=-1))


@net((TOKENS,), lambda: {"make": nn.Linear(6, 40), "a": nn.Linear(6, 8), "b": nn.Linear(5, 3)}, {})
def weights_from_the_input(m: Net, x: Tensor) -> Tensor:
    weights = m.make(x.mean(1)).view(-1, 8, 5)
    return m.b(torch.bmm(m.a(x), weights))


@net((TOKENS,), lambda: {"a": nn.Linear(6, 9), "b": nn.Linear(9, 3)}, {})
def branch_on_a_width(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(F.relu(y)) if y.shape[-1] > 8 else m.b(y)


@net((TOKENS,), lambda: {"a": nn.Linear(6, 9), "b": nn.Linear(9, 3)}, {})
def widths_as_numbers(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    return m.b(y) / y.size(-1) + math.log(m.a.out_features)


# recurrent


def _recurrent(layer: nn.Module, width: int) -> dict[str, object]:
    return {"a": nn.Linear(6, 12), "rnn": layer, "b": nn.Linear(width, 3)}


@net((TOKENS,), lambda: _recurrent(nn.LSTM(12, 8, batch_first=True), 8), {"a": 12, "rnn": 8})
def lstm(m: Net, x: Tensor) -> Tensor:
    return m.b(m.rnn(m.a(x))[0])


@net(
    (TOKENS,),
    lambda: _recurrent(nn.LSTM(12, 8, 2, batch_first=True, bidirectional=True, proj_size=5), 10),
    {"a": 12, "rnn": 13},
)
def lstm_of_two_layers_both_ways_projected(m: Net, x: Tensor) -> Tensor:
    return m.b(m.rnn(m.a(x))[0])


@net((TOKENS,), lambda: _recurrent(nn.GRU(12, 8, 2, bidirectional=True), 16), {"a": 12, "rnn": 8})
def gru_of_two_layers_both_ways(m: Net, x: Tensor) -> Tensor:
    y, last = m.rnn(m.a(x).transpose(0, 1))
    return m.b(y).transpose(0, 1) + m.b(torch.cat([last[-2], last[-1]], -1))[:, None]


@net((TOKENS,), lambda: _recurrent(nn.RNN(12, 8, batch_first=True), 8), {"a": 12, "rnn": 8})
def elman_rnn(m: Net, x: Tensor) -> Tensor:
    return m.b(m.rnn(m.a(x))[1][0])


@net((TOKENS,), lambda: _recurrent(nn.GRUCell(12, 8), 8), {"a": 12})
def gru_cell(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    state = torch.zeros(x.shape[0], m.rnn.hidden_size, dtype=x.dtype, device=x.device)
    for step in range(x.shape[1]):
        state = m.rnn(x[:, step], state)
    return m.b(state)


@net(
    (TOKENS,),
    lambda: {"a": nn.Linear(6, 8), "mix": weights(5, 5), "b": nn.Linear(8, 3), "copies": 4},
    {"a": 8},
)
def products_of_copies(m: Net, x: Tensor) -> Tensor:
    """Both factors of a product are copied as often as an attribute says: each copy costs."""
    mix = m.mix.expand(m.copies, -1, -1)
    return m.b(F.relu((mix @ mix).mean(0) @ m.a(x)))
