"""Ten-line networks, one for each hard case."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """A network whose forward is one function of its modules."""

    def __init__(self, run: Callable[..., torch.Tensor], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.run(self, *inputs)


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


def _conv(i: int, o: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **options)


class Recurrent(nn.Module):
    """A module that torch has no operator rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.b = nn.Linear(6, 12), nn.GRU(12, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.rnn(self.a(x))[0])


IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, 6)

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "mlp": (lambda: Net(_mlp, a=nn.Linear(6, 20), b=nn.Linear(20, 3)), (TOKENS,)),
    "gated_mlp": (lambda: Net(_gated, a=nn.Linear(6, 20), b=nn.Linear(10, 3)), (TOKENS,)),
    "channel_shuffle": (lambda: Net(_shuffle, a=_conv(3, 12), b=_conv(12, 10), c=_conv(10, 3)), (IMAGE,)),
    "dense_concatenation": (
        lambda: Net(_dense, a=_conv(3, 8), b=_conv(8, 6), c=_conv(19, 3), d=_conv(14, 5)),
        (IMAGE,),
    ),
    "flattened_feature_map": (lambda: Net(_flattened, a=_conv(3, 8), b=nn.Linear(32, 3)), (IMAGE,)),
    "grouped_conv": (
        lambda: nn.Sequential(_conv(3, 12), nn.ReLU(), _conv(12, 18, groups=3), nn.ReLU(), _conv(18, 3)),
        (IMAGE,),
    ),
    "depthwise_multiplier": (
        lambda: nn.Sequential(_conv(3, 6), nn.ReLU(), _conv(6, 12, groups=6), nn.ReLU(), _conv(12, 3)),
        (IMAGE,),
    ),
    "transposed_conv": (
        lambda: nn.Sequential(_conv(3, 8), nn.ConvTranspose2d(8, 10, 2, 2), nn.ReLU(), _conv(10, 3)),
        (IMAGE,),
    ),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(5, 8, 3), nn.ReLU(), nn.Conv1d(8, 3, 1)), (TOKENS,)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 8, 3), nn.ReLU(), nn.Conv3d(8, 3, 1)), ((2, 1, 4, 4, 4),)),
    "group_norm": (
        lambda: nn.Sequential(
            _conv(3, 12), nn.BatchNorm2d(12), nn.ReLU(), _conv(12, 8), nn.BatchNorm2d(8), _conv(8, 3)
        ),
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
    "flip": (lambda: Net(_flip, a=_conv(3, 8), b=_conv(8, 3)), (IMAGE,)),
    "pixel_shuffle": (lambda: Net(_pixel_shuffle, a=_conv(3, 16), b=_conv(4, 3)), (IMAGE,)),
    "squeeze_excite": (
        lambda: Net(_squeeze_excite, a=_conv(3, 8), b=nn.Conv2d(8, 4, 1), c=nn.Conv2d(4, 8, 1), d=_conv(8, 3)),
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
    """Returns a network in eval mode and float64 with random values everywhere, and random inputs."""
    torch.manual_seed(0)
    make, shapes = NETS[name]
    model = make().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model, tuple(torch.randn(s, dtype=torch.float64) for s in shapes)
