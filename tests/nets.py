"""Ten-line networks, one for each hard case."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

Shape = tuple[int, ...]
Run = Callable[..., Any]


class Net(nn.Module):
    """A network whose forward is one function of its modules."""

    def __init__(self, run: Run, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        self.run = run

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(self, *inputs)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Hard:
    """A net, the shapes of its inputs (of integers below `ids`, if that is given), and the groups to be found in it."""

    make: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    groups: dict[str, int]
    ids: int | None = None


HARD_NETS: dict[str, Hard] = {}
"""Filled by `net`, when the modules of nets beside this one are imported."""


def net(
    shapes: tuple[Shape, ...],
    attributes: Callable[[], dict[str, Any]],
    groups: dict[str, int],
    *,
    name: str | None = None,
    ids: int | None = None,
) -> Callable[[Run], Run]:
    """Returns a decorator that makes of a function of (net, inputs) the forward of a net with these attributes."""

    def add(run: Run) -> Run:
        key = name or run.__name__
        assert key not in NETS, key
        assert key not in HARD_NETS, key
        HARD_NETS[key] = Hard(lambda: Net(run, **attributes()), shapes, groups, ids)
        return run

    return add


def around(layer: nn.Module, **others: object) -> dict[str, object]:
    """Returns the attributes of a net on tokens of width 16 around a layer."""
    return {"stem": nn.Linear(6, 16), "layer": layer, "head": nn.Linear(16, 3), **others}


def weights(*shape: int) -> nn.Parameter:
    """Returns a parameter without a module."""
    return nn.Parameter(torch.randn(*shape) / 3)


def conv(i: int, o: int, **options: Any) -> nn.Conv2d:
    """Returns a convolution of 3 x 3 that keeps the size of a picture."""
    return nn.Conv2d(i, o, 3, padding=1, **options)


class Attention(nn.Module):
    """Attention as people write it, with sizes as attributes and the temperature computed on the way."""

    def __init__(self, dim: int, heads: int, style: str) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim, self.style = dim, heads, dim // heads, style
        kv = dim // 2 if style == "grouped_queries" else dim
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, kv), nn.Linear(dim, kv)
        self.out = nn.Linear(dim, dim)
        self.mix = nn.Linear(heads, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = (m(x).view(n, t, -1, self.head_dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.style == "grouped_queries":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif self.style == "sqrt":
            y = (q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(-1) @ v
        elif self.style == "power":
            y = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        elif self.style == "talking":
            scores = (q @ k.transpose(-2, -1) * 0.3).permute(0, 2, 3, 1)
            y = self.mix(scores).permute(0, 3, 1, 2).softmax(-1) @ v
        else:
            y = torch.einsum("nhij,nhjd->nhid", torch.einsum("nhid,nhjd->nhij", q, k).softmax(-1), v)
        return self.out(y.transpose(1, 2).flatten(2))


def _mlp(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.b(F.gelu(m.a(x)))


def _gated(m: Net, x: torch.Tensor) -> torch.Tensor:
    left, right = m.a(x).chunk(2, -1)
    return m.b(F.silu(left) * right)


def _shuffle(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    n, c, h, w = y.shape
    y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return m.c(m.b(y)).mean((2, 3))


def _dense(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    z = torch.cat([y, m.b(F.relu(y))], 1)
    return m.c(torch.cat([z, m.d(z)], 1)).mean((2, 3))


def _flattened(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.b(F.max_pool2d(F.relu(m.a(x)), 4).flatten(1))


def _shared(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.b(F.relu(m.s(F.relu(m.s(F.relu(m.a(x)))))))


def _tied(m: Net, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, m.a.weight)), m.a.weight.t())


def _functional(m: Net, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(x @ m.w + m.shift), m.b.weight, m.b.bias)


def _sliced(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    return m.b(torch.cat([y[..., 4:], y[..., :4]], -1))


def _uneven(m: Net, x: torch.Tensor) -> torch.Tensor:
    left, right = m.a(x).split([5, 11], -1)
    return m.b(left) + m.c(right)


def _flip(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.b(m.a(x).flip(1)).mean((2, 3))


def _pixel_shuffle(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.b(F.relu(F.pixel_shuffle(m.a(x), 2))).mean((2, 3))


def _squeeze_excite(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    gate = m.c(F.relu(m.b(y.mean((2, 3), keepdim=True)))).sigmoid()
    return m.d(y * gate).mean((2, 3))


def _two_inputs(m: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return m.c(F.relu(m.a(x) + m.b(y)))


def _written(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x).clone()
    y[..., :8] = m.c(x)
    return m.b(F.relu(y))


def _unknown(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    return m.b(torch.linalg.qr(y)[0] + y)


def _attention(style: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers = Attention(16, 4, style), Attention(16, 4, style)
        return Net(
            lambda m, x: m.head(F.relu(m.l1(F.relu(m.l0(m.stem(x))))).mean(1)),
            stem=nn.Linear(6, 16),
            l0=layers[0],
            l1=layers[1],
            head=nn.Linear(16, 3),
        )

    return build


class Recurrent(nn.Module):
    """A module that torch has no operator rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.b = nn.Linear(6, 12), nn.GRU(12, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.rnn(self.a(x))[0])


IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, 6)

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[Shape, ...]]] = {
    "mlp": (lambda: Net(_mlp, a=nn.Linear(6, 20), b=nn.Linear(20, 3)), (TOKENS,)),
    "gated_mlp": (lambda: Net(_gated, a=nn.Linear(6, 20), b=nn.Linear(10, 3)), (TOKENS,)),
    "channel_shuffle": (lambda: Net(_shuffle, a=conv(3, 12), b=conv(12, 10), c=conv(10, 3)), (IMAGE,)),
    "dense_concatenation": (
        lambda: Net(_dense, a=conv(3, 8), b=conv(8, 6), c=conv(19, 3), d=conv(14, 5)),
        (IMAGE,),
    ),
    "flattened_feature_map": (lambda: Net(_flattened, a=conv(3, 8), b=nn.Linear(32, 3)), (IMAGE,)),
    "grouped_conv": (
        lambda: nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 18, groups=3), nn.ReLU(), conv(18, 3)),
        (IMAGE,),
    ),
    "depthwise_multiplier": (
        lambda: nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 12, groups=6), nn.ReLU(), conv(12, 3)),
        (IMAGE,),
    ),
    "transposed_conv": (
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 10, 2, 2), nn.ReLU(), conv(10, 3)),
        (IMAGE,),
    ),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(5, 8, 3), nn.ReLU(), nn.Conv1d(8, 3, 1)), (TOKENS,)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 8, 3), nn.ReLU(), nn.Conv3d(8, 3, 1)), ((2, 1, 4, 4, 4),)),
    "group_norm": (
        lambda: nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 8), nn.BatchNorm2d(8), conv(8, 3)),
        (IMAGE,),
    ),
    "shared_module": (lambda: Net(_shared, a=nn.Linear(6, 9), s=nn.Linear(9, 9), b=nn.Linear(9, 3)), (TOKENS,)),
    "tied_weights": (lambda: Net(_tied, a=nn.Linear(6, 9)), (TOKENS,)),
    "functional": (
        lambda: Net(
            _functional, w=nn.Parameter(torch.randn(6, 9)), shift=nn.Parameter(torch.randn(9)), b=nn.Linear(9, 3)
        ),
        (TOKENS,),
    ),
    "fixed_slices": (lambda: Net(_sliced, a=nn.Linear(6, 12), b=nn.Linear(12, 3)), (TOKENS,)),
    "uneven_split": (lambda: Net(_uneven, a=nn.Linear(6, 16), b=nn.Linear(5, 3), c=nn.Linear(11, 3)), (TOKENS,)),
    "flip": (lambda: Net(_flip, a=conv(3, 8), b=conv(8, 3)), (IMAGE,)),
    "pixel_shuffle": (lambda: Net(_pixel_shuffle, a=conv(3, 16), b=conv(4, 3)), (IMAGE,)),
    "squeeze_excite": (
        lambda: Net(_squeeze_excite, a=conv(3, 8), b=nn.Conv2d(8, 4, 1), c=nn.Conv2d(4, 8, 1), d=conv(8, 3)),
        (IMAGE,),
    ),
    "two_inputs": (
        lambda: Net(_two_inputs, a=nn.Linear(6, 9), b=nn.Linear(4, 9), c=nn.Linear(9, 3)),
        (TOKENS, (2, 5, 4)),
    ),
    "written_in_place": (lambda: Net(_written, a=nn.Linear(6, 12), b=nn.Linear(12, 3), c=nn.Linear(6, 8)), (TOKENS,)),
    "unknown_operator": (lambda: Net(_unknown, a=nn.Linear(6, 5), b=nn.Linear(5, 3)), (TOKENS,)),
    "gru": (Recurrent, (TOKENS,)),
    "torch_encoder": (
        lambda: nn.Sequential(
            nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), nn.Linear(16, 3)
        ),
        (TOKENS,),
    ),
    **{
        f"attention_{style}": (_attention(style), (TOKENS,))
        for style in ("grouped_queries", "sqrt", "power", "talking", "einsum")
    },
}


def build(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Returns a network in eval mode and float64 with random values everywhere, and random inputs.

    Values that layers initialise to 0 or 1 (biases, scales, statistics) would hide mistakes.
    """
    torch.manual_seed(0)
    hard = HARD_NETS.get(name) or Hard(*NETS[name], {})
    model = hard.make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 2)
    if hard.ids is not None:
        return model, tuple(torch.randint(hard.ids, s) for s in hard.shapes)
    return model, tuple(torch.randn(s, dtype=torch.float64) for s in hard.shapes)
