"""Random networks: a strategy that puts modules on tokens and on pictures together into networks that run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from nets import Attention
from random_modules import (
    Along,
    Blurred,
    ChannelsLast,
    ClassToken,
    Concatenated,
    Coupling,
    Decoder,
    DownAndUp,
    Functional,
    Gated,
    GroupedQueries,
    Maxout,
    Network,
    Recurrent,
    Residual,
    Shuffle,
    ShuffleUnit,
    SideOutput,
    Split,
    SqueezeExcite,
    Standardised,
    TokenMixing,
    ToPicture,
    Torch,
    ToTokens,
    ToWindows,
    Turned,
    Twice,
)

BATCH = 2


@dataclass(frozen=True)
class Tokens:
    """Tensors [batch, count, width]."""

    count: int
    width: int


@dataclass(frozen=True)
class Picture:
    """Tensors [batch, width, side, side]."""

    width: int
    side: int


Space = Tokens | Picture

Block = tuple[nn.Module, Space]
Draw = st.DrawFn
ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.Hardswish)


def _of(draw: Draw, *values: Any) -> Any:
    return draw(st.sampled_from(values))


def _activation(draw: Draw) -> nn.Module:
    return draw(st.sampled_from(ACTIVATIONS))()


def _linear(draw: Draw, x: Tokens, depth: int) -> Block:
    out = _of(draw, 4, 6, 8, 12)
    return nn.Sequential(nn.Linear(x.width, out, bias=draw(st.booleans())), _activation(draw)), Tokens(x.count, out)


def _mlp(draw: Draw, x: Tokens, depth: int) -> Block:
    hidden = draw(st.integers(3, 12))
    kind = _of(draw, "mlp", "gated", "maxout", "coupling", "parameters", "tied")
    if kind == "gated":
        return Gated(x.width, hidden), x
    if kind == "maxout":
        return Maxout(x.width, hidden, _of(draw, 2, 3)), Tokens(x.count, hidden)
    if kind == "coupling" and x.width % 2 == 0:
        return Coupling(x.width), x
    if kind in ("parameters", "tied"):
        return Functional(x.width, hidden, kind == "tied"), x
    return nn.Sequential(nn.Linear(x.width, hidden), _activation(draw), nn.Linear(hidden, x.width)), x


def _attention(draw: Draw, x: Tokens, depth: int) -> Block:
    if x.width % 4:
        return _linear(draw, x, depth)
    heads = _of(draw, 2, 4)
    kind = _of(draw, "own", "torch", "shared_keys", "turned", "decoder")
    if kind == "torch":
        queries = _of(draw, 0, 3)
        layer = Torch(x.width, heads, queries, draw(st.booleans()))
        return layer, Tokens(queries or x.count, x.width)
    if kind == "shared_keys":
        return GroupedQueries(x.width, heads, _of(draw, 1, heads // 2), draw(st.booleans())), x
    if kind == "turned":
        return Turned(x.width, heads, _of(draw, "linear", "cosine", "rotary")), x
    if kind == "decoder":
        return Decoder(x.width, heads, _of(draw, 2, 5)), x
    styles = ["sqrt", "power", "talking", "grouped_queries"]
    # torch.einsum multiplies element by element where a sum has one term, which the counter of MACs does not see
    return Attention(x.width, heads, _of(draw, *styles, *(["einsum"] if x.width > heads else []))), x


def _encoder(draw: Draw, x: Tokens, depth: int) -> Block:
    if x.width % 4:
        return _linear(draw, x, depth)
    first = draw(st.booleans())
    return nn.TransformerEncoderLayer(x.width, _of(draw, 2, 4), 7, batch_first=True, norm_first=first), x


def _token_norm(draw: Draw, x: Tokens, depth: int) -> Block:
    return _of(draw, nn.LayerNorm, nn.RMSNorm)(x.width), x


def _token_convolution(draw: Draw, x: Tokens, depth: int) -> Block:
    out = math.lcm(x.width, 4)
    groups = _of(draw, 1, 2 if x.width % 2 == 0 else 1, x.width)
    return Along(nn.Conv1d(x.width, out, 3, padding=1, groups=groups)), Tokens(x.count, out)


def _mixing(draw: Draw, x: Tokens, depth: int) -> Block:
    kind = _of(draw, "tokens", "recurrent", "class")
    if kind == "tokens":
        return TokenMixing(x.count, draw(st.integers(3, 6))), x
    if kind == "class":
        return ClassToken(x.count, x.width), Tokens(x.count + 1, x.width)
    layer = _of(draw, nn.GRU, nn.LSTM)(x.width, 5, batch_first=True, bidirectional=draw(st.booleans()))
    return Recurrent(layer), Tokens(x.count, 10 if layer.bidirectional else 5)


def _to_picture(draw: Draw, x: Tokens, depth: int) -> Block:
    side = math.isqrt(x.count)
    return (ToPicture(side), Picture(x.width, side)) if side * side == x.count else _linear(draw, x, depth)


def _convolution(draw: Draw, x: Picture, depth: int) -> Block:
    out = _of(draw, 4, 6, 8, 12)
    norm = _of(draw, nn.Identity, nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm)
    norm = norm(_of(draw, 1, 2, out), out) if norm is nn.GroupNorm else norm(out) if x.side > 1 else nn.Identity()
    layer = _of(draw, nn.Conv2d, nn.Conv2d, Standardised)(x.width, out, _of(draw, 1, 3), padding="same")
    layer = weight_norm(layer) if type(layer) is nn.Conv2d and draw(st.booleans()) else layer
    after = [norm, _activation(draw), *([nn.PReLU(out)] if draw(st.booleans()) else [])]
    return nn.Sequential(layer, *after), Picture(out, x.side)


def _picture_norm(draw: Draw, x: Picture, depth: int) -> Block:
    kind = _of(draw, "norm", "shuffle", "blur")
    if kind == "shuffle" and x.width % 2 == 0:
        return ShuffleUnit(x.width), x
    return (Blurred() if kind == "blur" else ChannelsLast(nn.LayerNorm(x.width))), x


def _grouped(draw: Draw, x: Picture, depth: int) -> Block:
    groups = _of(draw, 2, 4)
    middle, out = math.lcm(x.width, groups), 12
    layers = [nn.Conv2d(x.width, middle, 1), _activation(draw)]
    if draw(st.booleans()):
        layers.append(Shuffle(groups) if draw(st.booleans()) else nn.ChannelShuffle(groups))
    layers.append(nn.Conv2d(middle, out, 3, padding=1, groups=groups))
    return nn.Sequential(*layers), Picture(out, x.side)


def _depthwise(draw: Draw, x: Picture, depth: int) -> Block:
    times = _of(draw, 1, 1, 2)
    return nn.Conv2d(x.width, times * x.width, 3, padding=1, groups=x.width), Picture(times * x.width, x.side)


def _excite(draw: Draw, x: Picture, depth: int) -> Block:
    return SqueezeExcite(x.width, draw(st.integers(2, 5))), x


def _transposed(draw: Draw, x: Picture, depth: int) -> Block:
    if x.side > 4:
        return nn.MaxPool2d(2), Picture(x.width, x.side // 2)
    kind = _of(draw, "plain", "pixels", "grouped")
    if kind == "pixels" and x.width % 4 == 0:
        return nn.PixelShuffle(2), Picture(x.width // 4, 2 * x.side)
    out = _of(draw, 4, 6)
    groups = 2 if kind == "grouped" and x.width % 2 == 0 else 1
    return nn.ConvTranspose2d(x.width, out, 2, 2, groups=groups), Picture(out, 2 * x.side)


def _down(draw: Draw, x: Picture, depth: int) -> Block:
    if x.side % 2:
        return _excite(draw, x, depth)
    kind = _of(draw, "average", "maximum", "strided", "pixels")
    if kind == "pixels" and x.width <= 8:
        return nn.PixelUnshuffle(2), Picture(4 * x.width, x.side // 2)
    if kind == "strided":
        return nn.Conv2d(x.width, 8, 2, 2), Picture(8, x.side // 2)
    return (nn.AvgPool2d(2) if kind == "average" else nn.MaxPool2d(2)), Picture(x.width, x.side // 2)


def _u_net(draw: Draw, x: Picture, depth: int) -> Block:
    if x.side % 2 or not depth:
        return _convolution(draw, x, depth)
    inner, y = _convolution(draw, Picture(x.width, x.side // 2), depth - 1)
    up = None if draw(st.booleans()) else nn.ConvTranspose2d(y.width, 5, 2, 2)
    return DownAndUp(inner, up), Picture(x.width + (y.width if up is None else 5), x.side)


def _to_tokens(draw: Draw, x: Picture, depth: int) -> Block:
    if x.side % 2 == 0 and x.width <= 8 and draw(st.booleans()):
        return ToWindows(), Tokens(x.side**2 // 4, 4 * x.width)
    return ToTokens(), Tokens(x.side**2, x.width)


def _same_shape(draw: Draw, x: Space, depth: int) -> nn.Module:
    """Draws a block and what brings its result back to the space that it came from, or a plain layer if nothing can."""
    inner, y = block(draw, x, depth)
    if y == x:
        return inner
    if isinstance(x, Tokens):
        if isinstance(y, Tokens) and y.count == x.count:
            return nn.Sequential(inner, nn.Linear(y.width, x.width))
        return nn.Linear(x.width, x.width)
    if isinstance(y, Picture) and y.side == x.side:
        return nn.Sequential(inner, nn.Conv2d(y.width, x.width, 1))
    return nn.Conv2d(x.width, x.width, 3, padding=1)


def _residual(draw: Draw, x: Space, depth: int) -> Block:
    return Residual(_same_shape(draw, x, depth - 1)), x


def _twice(draw: Draw, x: Space, depth: int) -> Block:
    return Twice(_same_shape(draw, x, depth - 1)), x


def _wider(x: Space, width: int) -> Space:
    return Tokens(x.count, width) if isinstance(x, Tokens) else Picture(width, x.side)


def _concatenation(draw: Draw, x: Space, depth: int) -> Block:
    parts = [nn.Identity(), _same_shape(draw, x, depth - 1), _same_shape(draw, x, depth - 1)]
    kept = parts[draw(st.integers(0, 1)) :]
    return Concatenated(kept, 2 if isinstance(x, Tokens) else 1), _wider(x, len(kept) * x.width)


def _split(draw: Draw, x: Space, depth: int) -> Block:
    left = draw(st.integers(2, x.width - 2))
    inner = _same_shape(draw, _wider(x, left), depth - 1)
    return Split(inner, (left, x.width - left), 2 if isinstance(x, Tokens) else 1), x


Maker = Callable[[Draw, Any, int], Block]
ON_TOKENS: tuple[Maker, ...] = (
    *(_linear, _mlp, _attention, _attention, _encoder, _token_norm, _token_convolution, _mixing, _to_picture),
)
ON_PICTURES: tuple[Maker, ...] = (
    *(_convolution, _convolution, _picture_norm, _grouped, _depthwise, _excite, _transposed, _down, _u_net, _to_tokens),
)
AROUND: tuple[Maker, ...] = (_residual, _residual, _twice, _concatenation, _split)
WIDEST = 32


def block(draw: Draw, x: Space, depth: int = 2) -> Block:
    """Draws a module on the space `x`, and the space that it leads to."""
    plain = ON_TOKENS if isinstance(x, Tokens) else ON_PICTURES
    around = AROUND if depth and 4 <= x.width <= WIDEST // 2 else ()
    return draw(st.sampled_from((*plain, *around)))(draw, x, depth)


def _head(draw: Draw, x: Space, out: int) -> nn.Module:
    if isinstance(x, Tokens):
        flat = [nn.Flatten(), nn.Linear(x.count * x.width, out)]
        return nn.Sequential(*flat) if draw(st.booleans()) else nn.Linear(x.width, out)
    if draw(st.booleans()):
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * x.width, out))
    return nn.Conv2d(x.width, out, 1)


@st.composite
def networks(draw: Draw) -> tuple[nn.Module, tuple[int, ...]]:
    """Draws a network in eval mode and float64 with random values everywhere, and the shape of its input."""
    x: Space = _of(draw, Tokens(4, 6), Tokens(9, 4), Picture(3, 8), Picture(3, 4))
    shape = (BATCH, x.count, x.width) if isinstance(x, Tokens) else (BATCH, x.width, x.side, x.side)
    first = nn.Linear(x.width, 8) if isinstance(x, Tokens) else nn.Conv2d(x.width, 8, 3, padding=1)
    layers: list[nn.Module] = [first]
    x = _wider(x, 8)
    for _ in range(draw(st.integers(2, 6))):
        layer, x = block(draw, x)
        layers.append(layer)
        if x.width > WIDEST:
            layers.append(nn.Linear(x.width, 8) if isinstance(x, Tokens) else nn.Conv2d(x.width, 8, 1))
            x = _wider(x, 8)
        if draw(st.integers(0, 5)) == 0:
            layers.append(SideOutput(nn.Linear(x.width, 2)))
    model = Network([*layers, _head(draw, x, 3)], _of(draw, "tensor", "tuple", "dict")).double().eval()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                scale = max(1.0, tensor[0].numel() ** 0.5) if tensor.ndim > 1 else 1.0
                tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise / scale)
    return model, shape
