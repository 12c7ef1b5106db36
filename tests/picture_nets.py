"""Networks on pictures: shuffles, splits, attention, pyramids and patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from layer_nets import chain
from nets import IMAGE, Net, conv, net

Tensor = torch.Tensor


# shuffles, splits and concatenations

chain(
    "channel_shuffle_module",
    IMAGE,
    {"f.0": 6, "f.3": 10},
    lambda: conv(3, 12),
    lambda: nn.ChannelShuffle(2),
    nn.ReLU,
    lambda: conv(12, 10),
    nn.ReLU,
    lambda: conv(10, 3),
)
chain(
    "pixel_unshuffle",
    IMAGE,
    {"f.0": 5, "f.2": 8},
    lambda: conv(3, 5),
    lambda: nn.PixelUnshuffle(2),
    lambda: conv(20, 8),
    nn.ReLU,
    lambda: conv(8, 3),
)
chain(
    "super_resolution",
    IMAGE,
    {"f.0": 10, "f.2": 6},
    lambda: conv(3, 10),
    nn.ReLU,
    lambda: conv(10, 24),
    lambda: nn.PixelShuffle(2),
    nn.ReLU,
    lambda: conv(6, 3),
)


@net(
    (IMAGE,),
    lambda: {
        "a": conv(3, 12),
        "b": nn.Conv2d(6, 6, 1),
        "c": conv(6, 6, groups=6),
        "d": nn.Conv2d(6, 6, 1),
        "e": conv(12, 3),
    },
    {"a": 12, "b": 6},
)
def shuffle_unit(m: Net, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, 1)
    y = torch.cat([left, F.relu(m.d(m.c(F.relu(m.b(right)))))], 1)
    n, c, h, w = y.shape
    return m.e(y.reshape(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2))


@net(
    (IMAGE,),
    lambda: {"a": conv(3, 12), "f": nn.ModuleList(conv(3, 3) for _ in range(3)), "b": conv(12, 3), "width": 3},
    {"a": 9, "f.2": 3},
)
def hierarchy_of_splits(m: Net, x: Tensor) -> Tensor:
    pieces = torch.split(F.relu(m.a(x)), m.width, 1)
    done = [pieces[0]]
    for piece, f in zip(pieces[1:], m.f, strict=True):
        done.append(F.relu(f(piece + done[-1])))
    return m.b(torch.cat(done, 1))


@net((IMAGE,), lambda: {"a": conv(3, 5), "cheap": conv(5, 5, groups=5), "b": conv(9, 3), "width": 9}, {"a": 5})
def ghost_module(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    return m.b(torch.cat([y, F.relu(m.cheap(y))], 1)[:, : m.width])


@net(
    (IMAGE,),
    lambda: {"a": conv(3, 12), "b": conv(4, 4), "c": nn.Conv2d(12, 3, 1), "sizes": [4, 8]},
    {"a": 12, "b": 4},
)
def partial_convolution(m: Net, x: Tensor) -> Tensor:
    left, right = F.relu(m.a(x)).split(m.sizes, 1)
    return m.c(torch.cat([m.b(left), right], 1))


@net(
    (IMAGE,),
    lambda: {"a": conv(3, 6), "b": conv(6, 4), "c": nn.Conv2d(6, 5, 1), "d": conv(15, 3)},
    {"a": 6, "b": 4, "c": 5},
)
def inception(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    parts = [m.b(y), m.c(y), F.max_pool2d(y, 3, 1, 1)]
    return m.d(torch.cat(parts, 1))


@net((IMAGE,), lambda: {"a": nn.Conv2d(12, 8, 1), "b": conv(8, 3)}, {"a": 8})
def focus(m: Net, x: Tensor) -> Tensor:
    corners = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
    return m.b(F.silu(m.a(torch.cat(corners, 1))))


@net(
    (IMAGE,),
    lambda: {"a": conv(3, 6), "b": conv(6, 6), "c": conv(6, 10, stride=2), "d": conv(10, 3)},
    {"a": 6, "b": 6},
)
def padded_shortcut(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    y = m.c(F.relu(m.b(x)))
    return m.d(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))))


@net((IMAGE,), lambda: {"a": conv(3, 6), "b": conv(12, 3)}, {"a": 6})
def repeated_channels(m: Net, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)).repeat(1, 2, 1, 1))


@net((IMAGE,), lambda: {"a": conv(3, 8), "kernel": nn.Buffer(torch.rand(1, 1, 3, 3)), "b": conv(8, 3)}, {"a": 8})
def blur_pool(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    return m.b(F.conv2d(y, m.kernel.repeat(y.shape[1], 1, 1, 1), stride=2, groups=y.shape[1]))


@net((IMAGE,), lambda: {"a": conv(3, 8), "kernel": nn.Buffer(torch.rand(8, 1, 3, 3)), "b": conv(8, 3)}, {"a": 8})
def blur_pool_of_stored_width(m: Net, x: Tensor) -> Tensor:
    return m.b(F.conv2d(F.relu(m.a(x)), m.kernel, groups=m.kernel.shape[0]))


@net((IMAGE,), lambda: {"a": conv(3, 16), "b": conv(16, 3), "share": 8}, {})
def temporal_shift(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    fold = y.shape[1] // m.share
    z = torch.zeros_like(y)
    z[:-1, :fold] = y[1:, :fold]
    z[:, fold:] = y[:, fold:]
    return m.b(z)


# attention on pictures


class Spatial(nn.Module):
    """Spatial attention of CBAM: mean and maximum over the channels make a gate for positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f, self.b = conv(3, 8), nn.Conv2d(2, 1, 3, padding=1), conv(8, 3)
        self.left = 8

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        gate = self.f(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)).sigmoid()
        return self.b(y * gate)

    def without(self, removed: dict[tuple[str, int], list[int]]) -> None:
        """Takes the mean over the survivors; the maximum of what follows a ReLU is the same."""
        left = 8 - len(removed.get(("a.weight", 0), []))

        def forward(x: Tensor) -> Tensor:
            y = F.relu(self.a(x))
            gate = self.f(torch.cat([y.sum(1, keepdim=True) / left, y.amax(1, keepdim=True)], 1)).sigmoid()
            return self.b(y * gate)

        self.forward = forward


chain("spatial_attention", IMAGE, {"f.0.a": 8}, Spatial)


@net(
    (IMAGE,),
    lambda: {"a": conv(3, 8), "f": nn.Conv1d(1, 1, 3, padding=1), "b": conv(8, 8), "c": conv(8, 3)},
    {"b": 8},
)
def attention_by_neighbouring_channels(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    gate = m.f(y.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]
    return m.c(F.relu(m.b(y * gate)))


@net(
    (IMAGE,),
    lambda: {
        "a": conv(3, 6),
        "b": conv(3, 6),
        "squeeze": nn.Linear(6, 4),
        "gates": nn.Linear(4, 12),
        "c": conv(6, 3),
    },
    {"a": 6, "squeeze": 4},
)
def selective_kernels(m: Net, x: Tensor) -> Tensor:
    y = torch.stack([m.a(x), m.b(x)], 1)
    gate = m.gates(F.relu(m.squeeze(y.sum(1).mean((2, 3))))).view(y.shape[0], 2, -1).softmax(1)
    return m.c((y * gate[..., None, None]).sum(1))


@net(
    (IMAGE,),
    lambda: {
        "a": conv(3, 8),
        "theta": nn.Conv2d(8, 4, 1),
        "phi": nn.Conv2d(8, 4, 1),
        "g": nn.Conv2d(8, 5, 1),
        "out": nn.Conv2d(5, 8, 1),
        "b": conv(8, 3),
    },
    {"a": 8, "theta": 4, "g": 5},
)
def non_local(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    theta, phi, g = (f(x).flatten(2) for f in (m.theta, m.phi, m.g))
    y = (theta.mT @ phi).softmax(-1) @ g.mT
    return m.b(x + m.out(y.mT.reshape(x.shape[0], -1, *x.shape[2:])))


@net((IMAGE,), lambda: {"a": conv(3, 6), "b": conv(6, 9), "c": nn.Linear(4, 18), "d": conv(9, 3)}, {"a": 6, "b": 9})
def modulation_by_a_condition(m: Net, x: Tensor, condition: Tensor | None = None) -> Tensor:
    scale, shift = m.c(x.new_ones(x.shape[0], 4)).chunk(2, -1)
    y = m.b(F.relu(m.a(x)))
    return m.d(F.relu(y * (1 + scale[..., None, None]) + shift[..., None, None]))


# pyramids and patches


@net(
    (IMAGE,),
    lambda: {
        "a": conv(3, 6),
        "b": conv(6, 10, stride=2),
        "c": conv(10, 12, stride=2),
        "laterals": nn.ModuleList(nn.Conv2d(n, 8, 1) for n in (6, 10, 12)),
        "out": nn.ModuleList(conv(8, 3) for _ in range(3)),
    },
    {"a": 6, "b": 10, "c": 12, "laterals.0": 8},
)
def feature_pyramid(m: Net, x: Tensor) -> list[Tensor]:
    levels = [F.relu(m.a(x))]
    for f in (m.b, m.c):
        levels.append(F.relu(f(levels[-1])))
    laterals = [f(y) for f, y in zip(m.laterals, levels, strict=True)]
    for i in (1, 0):
        laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], size=laterals[i].shape[-2:], mode="nearest")
    return [f(y) for f, y in zip(m.out, laterals, strict=True)]


@net(
    (IMAGE,),
    lambda: {
        "a": conv(3, 6),
        "b": conv(6, 10),
        "up": nn.ConvTranspose2d(10, 5, 2, 2),
        "c": conv(11, 7),
        "d": nn.Conv2d(7, 3, 1),
    },
    {"a": 6, "b": 10, "up": 5, "c": 7},
)
def u_net(m: Net, x: Tensor) -> Tensor:
    skip = F.relu(m.a(x))
    y = F.relu(m.up(F.relu(m.b(F.max_pool2d(skip, 2)))))
    y = F.pad(y, [0, skip.shape[3] - y.shape[3], 0, skip.shape[2] - y.shape[2]])
    return m.d(F.relu(m.c(torch.cat([skip, y], 1))))


@net(
    (IMAGE,),
    lambda: {"a": conv(3, 6), "f": nn.ModuleList(nn.Conv2d(6, 4, 1) for _ in range(3)), "b": conv(18, 3)},
    {"a": 6, "f.0": 4, "f.1": 4, "f.2": 4},
)
def pyramid_pooling(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    parts = [y]
    for size, f in zip((1, 2, 4), m.f, strict=True):
        parts.append(
            F.interpolate(f(F.adaptive_avg_pool2d(y, size)), y.shape[2:], mode="bilinear", align_corners=False)
        )
    return m.b(torch.cat(parts, 1))


@net((IMAGE,), lambda: {"a": conv(3, 6), "b": nn.Linear(24, 9), "c": nn.Linear(9, 3)}, {"a": 6, "b": 9})
def unfolded_patches(m: Net, x: Tensor) -> Tensor:
    return m.c(F.relu(m.b(F.unfold(F.relu(m.a(x)), 2, stride=2).transpose(1, 2))))


@net((IMAGE,), lambda: {"a": nn.Linear(12, 9), "b": nn.Linear(9, 24), "c": conv(6, 3)}, {"a": 9, "b": 6})
def folded_patches(m: Net, x: Tensor) -> Tensor:
    y = m.b(F.relu(m.a(F.unfold(x, 2, stride=2).transpose(1, 2)))).transpose(1, 2)
    return m.c(F.fold(y, x.shape[-2:], 2, stride=2))


@net((IMAGE,), lambda: {"a": conv(3, 6), "b": nn.Linear(6, 9), "c": nn.Linear(9, 3)}, {"a": 6, "b": 9})
def windows_by_tensor_unfold(m: Net, x: Tensor) -> Tensor:
    windows = F.relu(m.a(x)).unfold(2, 4, 4).unfold(3, 4, 4)
    return m.c(F.relu(m.b(windows.mean((-2, -1)).flatten(2).transpose(1, 2))))


@net(
    (IMAGE,),
    lambda: {"a": conv(3, 8), "down": nn.Linear(8, 12), "back": nn.Linear(12, 8), "b": conv(8, 3)},
    {"a": 8, "down": 12},
)
def picture_to_tokens_and_back(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    n, c, h, w = y.shape
    tokens = m.back(F.gelu(m.down(y.flatten(2).transpose(1, 2))))
    return m.b(y + tokens.transpose(1, 2).reshape(n, c, h, w))


@net((IMAGE,), lambda: {"a": conv(3, 8), "b": nn.Linear(96, 6), "c": nn.Linear(6, 3)}, {"a": 8, "b": 6})
def several_pools_side_by_side(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    y = torch.cat([F.adaptive_avg_pool2d(y, 2), F.adaptive_max_pool2d(y, 2), F.lp_pool2d(y + 1, 2, 4)], 1)
    return m.c(F.relu(m.b(y.flatten(1))))


@net((IMAGE,), lambda: {"a": conv(3, 8), "where": nn.Linear(8, 6), "b": conv(8, 3)}, {"a": 8})
def spatial_transformer(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    theta = m.where(y.mean((2, 3))).view(-1, 2, 3)
    grid = F.affine_grid(theta, [y.shape[0], y.shape[1], 4, 4], align_corners=False)
    return m.b(F.grid_sample(y, grid, align_corners=False))


@net(
    (IMAGE,),
    lambda: {"experts": nn.Parameter(torch.randn(3, 8, 3, 3, 3) / 3), "route": nn.Linear(3, 3), "b": conv(8, 3)},
    {"route": 3},  # the groups of the convolution are the images: its channels have no place of their own
)
def conditional_convolution(m: Net, x: Tensor) -> Tensor:
    weight = torch.einsum("ne,eoihw->noihw", m.route(x.mean((2, 3))).sigmoid(), m.experts)
    n, o, i, h, w = weight.shape
    y = F.conv2d(x.reshape(1, n * i, *x.shape[2:]), weight.reshape(n * o, i, h, w), padding=1, groups=n)
    return m.b(F.relu(y.view(n, o, *x.shape[2:])))


@net(
    (IMAGE,),
    lambda: {
        "a": conv(3, 8),
        "identity": nn.BatchNorm2d(8),
        "b": conv(8, 8),
        "c": nn.Conv2d(8, 8, 1),
        "d": conv(8, 3),
    },
    {"a": 8},
)
def branches_that_will_be_merged(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    return m.d(F.relu(m.identity(x) + m.b(x) + m.c(x)))


@net((IMAGE, (2, 3, 8, 8)), lambda: {"a": conv(3, 8), "b": nn.Linear(8, 6), "c": nn.Linear(6, 3)}, {"a": 8, "b": 6})
def siamese(m: Net, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    left, right = (m.b(F.relu(m.a(z)).mean((2, 3))) for z in (x, y))
    return m.c(F.relu(left - right)), F.cosine_similarity(left, right)


@net(
    ((2, 4, 3, 8, 8),),
    lambda: {"a": conv(3, 8), "f": nn.Conv1d(8, 6, 3, padding=1), "b": nn.Linear(6, 3)},
    {"a": 8, "f": 6},
)
def frames_in_the_batch(m: Net, x: Tensor) -> Tensor:
    n, t = x.shape[:2]
    y = F.relu(m.a(x.flatten(0, 1))).mean((2, 3)).view(n, t, -1)
    return m.b(F.relu(m.f(y.transpose(1, 2))).transpose(1, 2))
