"""What random networks are made of: modules on tokens, modules on pictures, and modules that hold others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor


# modules that hold others


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Concatenated(nn.Module):
    """Several branches side by side, along the channels."""

    def __init__(self, parts: list[nn.Module], dim: int) -> None:
        super().__init__()
        self.parts, self.dim = nn.ModuleList(parts), dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([p(x) for p in self.parts], self.dim)


class Twice(nn.Module):
    """One module used two times."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.relu(self.inner(x)))


class Split(nn.Module):
    """Two pieces of given widths: one goes through a module, the other past it."""

    def __init__(self, inner: nn.Module, sizes: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.inner, self.sizes, self.dim = inner, list(sizes), dim

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.split(self.sizes, self.dim)
        return torch.cat([right, self.inner(left)], self.dim)


class SideOutput(nn.Module):
    """A classifier on the way, whose result the network puts out as well."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.sum(1) if x.ndim == 3 else x.mean((2, 3)))


# modules on tokens


class Gated(nn.Module):
    """Both halves of one layer, one of them as a gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.gelu(a) * b)


class Torch(nn.Module):
    """torch's own attention, over itself or over learned queries."""

    def __init__(self, width: int, heads: int, queries: int, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=batch_first)
        self.queries = nn.Parameter(torch.zeros(1, queries, width)) if queries else None

    def forward(self, x: Tensor) -> Tensor:
        q = x if self.queries is None else self.queries.expand(x.shape[0], -1, -1)
        if self.attention.batch_first:
            return self.attention(q, x, x, need_weights=False)[0]
        q, x = q.transpose(0, 1), x.transpose(0, 1)
        return self.attention(q, x, x, need_weights=False)[0].transpose(0, 1)


class GroupedQueries(nn.Module):
    """Several query heads for each head of keys and values, repeated or expanded."""

    def __init__(self, width: int, heads: int, kv_heads: int, repeat: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.repeat = heads, kv_heads, width // heads, repeat
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, kv_heads * self.head_dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.heads, self.head_dim).transpose(1, 2)
        k, v = (f(x).view(n, t, self.kv_heads, self.head_dim).transpose(1, 2) for f in (self.k, self.v))
        if self.kv_heads > 1 and self.repeat:
            k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, v))
        elif self.kv_heads > 1:
            shape = n, self.kv_heads, self.heads // self.kv_heads, t, self.head_dim
            k, v = (y[:, :, None].expand(shape).reshape(n, self.heads, t, self.head_dim) for y in (k, v))
        return self.out(((q @ k.mT * 0.4).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Functional(nn.Module):
    """Parameters used without a layer: a product, a sum with one index to spare, and the transpose of what was used."""

    def __init__(self, width: int, hidden: int, tied: bool) -> None:
        super().__init__()
        self.w, self.shift = nn.Parameter(torch.zeros(width, hidden)), nn.Parameter(torch.zeros(hidden))
        self.back = None if tied else nn.Parameter(torch.zeros(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(x @ self.w + self.shift)
        return y @ self.w.t() if self.back is None else torch.matmul(y, self.back)


class TokenMixing(nn.Module):
    """A hidden layer over the tokens instead of the channels; the sum keeps the tokens themselves from being cut."""

    def __init__(self, count: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(count, hidden), nn.Linear(hidden, count)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Along(nn.Module):
    """A convolution along the tokens."""

    def __init__(self, inner: nn.Conv1d) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Recurrent(nn.Module):
    """A recurrent layer in the middle of a network."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class ClassToken(nn.Module):
    """A learned token in front, and positions."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.token, self.position = (nn.Parameter(torch.zeros(1, n, width)) for n in (1, count + 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position


class Turned(nn.Module):
    """Attention whose queries and keys are normalised, or turned by their position, before they meet."""

    def __init__(self, width: int, heads: int, style: str) -> None:
        super().__init__()
        self.heads, self.head_dim, self.style = heads, width // heads, style
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if self.style == "linear":
            y = F.relu(q) @ (F.relu(k).mT @ v)
        else:
            q, k = self._turn(q), self._turn(k)
            y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.out(y.transpose(1, 2).flatten(2))

    def _turn(self, x: Tensor) -> Tensor:
        if self.style == "cosine":
            return F.normalize(x, dim=-1)
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2], device=x.device).to(x)[:, None]
        return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()


class Maxout(nn.Module):
    """The largest of several pieces for each channel."""

    def __init__(self, width: int, out: int, pieces: int) -> None:
        super().__init__()
        self.layer, self.pieces = nn.Linear(width, out * pieces), pieces

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y.view(*y.shape[:-1], y.shape[-1] // self.pieces, self.pieces).amax(-1)

    def without(self, removed: dict[tuple[str, int], list[int]]) -> None:
        """Keeps absent pieces of what is left from being the largest."""
        gone = torch.zeros(self.layer.out_features, dtype=torch.bool)
        gone[removed.get(("layer.bias", 0), [])] = True
        units = gone.view(-1, self.pieces)
        with torch.no_grad():
            self.layer.bias[(units & ~units.all(1, keepdim=True)).ravel()] = -torch.inf


class Coupling(nn.Module):
    """Each half is changed by what the other half says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width // 2, width // 2), nn.Linear(width // 2, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        left = left + F.relu(self.a(right))
        return torch.cat([left, right * self.b(left).tanh()], -1)


class Decoder(nn.Module):
    """torch's decoder layer, reading from learned memory."""

    def __init__(self, width: int, heads: int, memory: int) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(width, heads, 6, batch_first=True)
        self.memory = nn.Parameter(torch.zeros(1, memory, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.memory.expand(x.shape[0], -1, -1))


# modules on pictures


class SqueezeExcite(nn.Module):
    """A gate for each channel from the mean of all."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))).sigmoid()


class Shuffle(nn.Module):
    """The channel shuffle of ShuffleNet, by hand."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class DownAndUp(nn.Module):
    """One level of a U-Net: down, through, up again, and beside what was there."""

    def __init__(self, inner: nn.Module, up: nn.Module | None) -> None:
        super().__init__()
        self.inner, self.up = inner, up

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(F.max_pool2d(x, 2))
        y = F.interpolate(y, scale_factor=2.0, mode="bilinear") if self.up is None else self.up(y)
        return torch.cat([x, y], 1)


class Standardised(nn.Conv2d):
    """A convolution with filters of unit length."""

    def forward(self, input: Tensor) -> Tensor:
        size = self.weight.square().sum((1, 2, 3), keepdim=True)
        return F.conv2d(input, self.weight * torch.rsqrt(size + 1e-6), self.bias, self.stride, self.padding)


class ChannelsLast(nn.Module):
    """A layer for the last dimension, over the channels of a picture."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ShuffleUnit(nn.Module):
    """One half goes through convolutions, and both are shuffled together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.inner = nn.Sequential(nn.Conv2d(half, half, 1), nn.ReLU(), nn.Conv2d(half, half, 3, 1, 1, groups=half))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        y = torch.cat([left, self.inner(right)], 1)
        n, c, h, w = y.shape
        return y.reshape(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)


class Blurred(nn.Module):
    """A fixed filter over each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.ones(1, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), padding=1, groups=x.shape[1])


# from one space to the other


class ToTokens(nn.Module):
    """Every position becomes a token."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class ToWindows(nn.Module):
    """Every window of 2 x 2 becomes a token of four times the width."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w // 4, 4 * c)


class ToPicture(nn.Module):
    """Tokens are laid out as a square again."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], -1, self.side, self.side)


class Network(nn.Module):
    """Layers one after another; the results of side outputs and of the last layer come out as one structure."""

    def __init__(self, layers: list[nn.Module], structure: str) -> None:
        super().__init__()
        self.layers, self.structure = nn.ModuleList(layers), structure

    def forward(self, x: Tensor) -> Any:
        found = []
        for layer in self.layers:
            if isinstance(layer, SideOutput):
                found.append(layer(x))
            else:
                x = layer(x)
        if self.structure == "tensor" and not found:
            return x
        return (
            (x, found) if self.structure == "tuple" else {"logits": x, **{f"side{i}": y for i, y in enumerate(found)}}
        )
