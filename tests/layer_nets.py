"""Networks of layers of every sort: convolutions, and norms of activations and weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from nets import IMAGE, TOKENS, Net, conv, net

Tensor = torch.Tensor
VOLUME = (2, 1, 4, 4, 4)


def _chain(*layers: nn.Module) -> dict[str, object]:
    return {"f": nn.Sequential(*layers)}


def _through(m: Net, x: Tensor) -> Tensor:
    return m.f(x)


def chain(name: str, shape: tuple[int, ...], groups: dict[str, int], *layers: type[nn.Module] | object) -> None:
    """Adds a net that is a plain chain of layers, given as functions that build them."""
    net((shape,), lambda: _chain(*(f() for f in layers)), groups, name=name)(_through)  # type: ignore[operator]


# convolutions of every sort

chain(
    "grouped_transposed_conv",
    IMAGE,
    {"f.0": 8, "f.2": 6},
    lambda: conv(3, 8),
    nn.ReLU,
    lambda: nn.ConvTranspose2d(8, 12, 2, 2, groups=2),
    nn.ReLU,
    lambda: conv(12, 3),
)
chain(
    "depthwise_transposed_conv",
    IMAGE,
    {"f.0": 8},
    lambda: conv(3, 8),
    lambda: nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8),
    nn.ReLU,
    lambda: conv(8, 3),
)
chain(
    "transposed_conv_with_output_padding",
    IMAGE,
    {"f.0": 8, "f.1": 10},
    lambda: conv(3, 8),
    lambda: nn.ConvTranspose2d(8, 10, 3, 2, 1, output_padding=1),
    nn.ReLU,
    lambda: conv(10, 3),
)
chain(
    "transposed_conv1d",
    TOKENS,
    {"f.0": 8, "f.2": 6},
    lambda: nn.Conv1d(5, 8, 3),
    nn.PReLU,
    lambda: nn.ConvTranspose1d(8, 6, 3),
    nn.ReLU,
    lambda: nn.Conv1d(6, 3, 1),
)
chain(
    "transposed_conv3d",
    VOLUME,
    {"f.0": 8, "f.2": 6},
    lambda: nn.Conv3d(1, 8, 3, padding=1),
    lambda: nn.BatchNorm3d(8),
    lambda: nn.ConvTranspose3d(8, 6, 2, 2),
    nn.ELU,
    lambda: nn.AvgPool3d(2),
    lambda: nn.Conv3d(6, 3, 1),
)
chain(
    "signal_classifier",
    TOKENS,
    {"f.0": 8, "f.3": 6},
    lambda: nn.Conv1d(5, 8, 3, padding=1),
    lambda: nn.BatchNorm1d(8),
    lambda: nn.MaxPool1d(2),
    lambda: nn.Conv1d(8, 6, 3, padding=1),
    lambda: nn.AdaptiveAvgPool1d(2),
    nn.Flatten,
    lambda: nn.Linear(12, 3),
)
chain(
    "two_grouped_convs",
    IMAGE,
    {"f.0": 4, "f.2": 4, "f.4": 18},
    lambda: conv(3, 12),
    nn.ReLU,
    lambda: conv(12, 12, groups=3),
    nn.ReLU,
    lambda: conv(12, 18, groups=3),
    nn.ReLU,
    lambda: conv(18, 3),
)
chain(
    "grouped_conv_after_another_grouping",
    IMAGE,
    {"f.0": 4, "f.2": 6, "f.4": 12},
    lambda: conv(3, 12),
    nn.ReLU,
    lambda: conv(12, 12, groups=3),
    nn.ReLU,
    lambda: conv(12, 12, groups=2),
    nn.ReLU,
    lambda: conv(12, 3),
)
chain(
    "inverted_residual_pieces",
    IMAGE,
    {"f.0": 12, "f.6": 8},
    lambda: nn.Conv2d(3, 12, 1),
    lambda: nn.BatchNorm2d(12),
    nn.Hardswish,
    lambda: conv(12, 12, groups=12, stride=2),
    lambda: nn.BatchNorm2d(12),
    nn.ReLU6,
    lambda: nn.Conv2d(12, 8, 1),
    lambda: nn.Dropout2d(0.1),
    lambda: conv(8, 3),
)
chain(
    "dilated_and_reflected",
    IMAGE,
    {"f.1": 8, "f.3": 6},
    lambda: nn.ReflectionPad2d(2),
    lambda: nn.Conv2d(3, 8, 3, dilation=2),
    lambda: nn.PReLU(8),
    lambda: nn.Conv2d(8, 6, 3, padding="same", padding_mode="circular"),
    lambda: nn.ZeroPad2d(1),
    lambda: nn.Conv2d(6, 3, 3),
)

# norms

chain(
    "group_norms",
    IMAGE,
    {"f.0": 12, "f.3": 8, "f.6": 5},
    lambda: conv(3, 12),
    lambda: nn.GroupNorm(4, 12),
    nn.ReLU,
    lambda: conv(12, 8),
    lambda: nn.GroupNorm(1, 8),
    nn.SiLU,
    lambda: conv(8, 5),
    lambda: nn.GroupNorm(5, 5),
    lambda: conv(5, 3),
)
chain(
    "instance_norms",
    IMAGE,
    {"f.0": 12, "f.3": 8},
    lambda: conv(3, 12),
    lambda: nn.InstanceNorm2d(12),
    nn.ReLU,
    lambda: conv(12, 8),
    lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    lambda: conv(8, 3),
)
chain(
    "batch_norm_without_weights",
    IMAGE,
    {"f.0": 12},
    lambda: conv(3, 12),
    lambda: nn.BatchNorm2d(12, affine=False),
    nn.ReLU,
    lambda: conv(12, 3),
)
chain(
    "weight_norm",
    IMAGE,
    {"f.0.parametrizations.weight": 12, "f.2.parametrizations.weight": 8},
    lambda: parametrizations.weight_norm(conv(3, 12)),
    nn.ReLU,
    lambda: parametrizations.weight_norm(conv(12, 8)),
    nn.ReLU,
    lambda: conv(8, 3),
)
chain(
    "weight_norm_as_a_hook",
    TOKENS,
    {"f.0": 12},
    lambda: nn.utils.weight_norm(nn.Linear(6, 12)),
    nn.ReLU,
    lambda: nn.Linear(12, 3),
)
chain(
    "spectral_norm",
    TOKENS,
    {"f.0.parametrizations.weight": 12},
    lambda: parametrizations.spectral_norm(nn.Linear(6, 12)),
    nn.ReLU,
    lambda: nn.Linear(12, 3),
)


class StdConv2d(nn.Conv2d):
    """A convolution whose filters are standardised."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        spread = self.weight.std((1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / (spread + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def without(self, removed: dict[tuple[str, int], list[int]]) -> None:
        """Standardises each surviving filter over the surviving inputs, and leaves the others zero."""
        rows, columns = (
            [i for i in range(n) if i not in removed.get(("weight", d), [])]
            for d, n in enumerate(self.weight.shape[:2])
        )
        left = self.weight[rows][:, columns]
        spread = left.std((1, 2, 3), keepdim=True, unbiased=False)
        weight = torch.zeros_like(self.weight)
        weight[torch.tensor(rows)[:, None], torch.tensor(columns)] = (left - left.mean((1, 2, 3), keepdim=True)) / (
            spread + 1e-5
        )
        self.forward = lambda x: F.conv2d(x, weight, self.bias, self.stride, self.padding)


chain(
    "weight_standardisation",
    IMAGE,
    {"f.0": 12, "f.2": 8},
    lambda: StdConv2d(3, 12, 3),
    nn.ReLU,
    lambda: StdConv2d(12, 8, 3),
    nn.ReLU,
    lambda: conv(8, 3),
)


class LocalResponseNorm(nn.Module):
    """Each channel divided by what its neighbours are."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.LocalResponseNorm(3, alpha=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


chain(
    "local_response_norm",
    IMAGE,
    {"f.3": 8},
    lambda: conv(3, 8),
    LocalResponseNorm,
    nn.ReLU,
    lambda: conv(8, 8),
    nn.ReLU,
    lambda: conv(8, 3),
)


@net(
    (IMAGE,),
    lambda: {
        "a": conv(3, 8),
        "mean": nn.Buffer(torch.randn(8)),
        "spread": nn.Buffer(torch.rand(8) + 0.5),
        "scale": nn.Parameter(torch.rand(8)),
        "b": conv(8, 3),
    },
    {"a": 8},
)
def functional_batch_norm(m: Net, x: Tensor) -> Tensor:
    return m.b(F.relu(F.batch_norm(m.a(x), m.mean, m.spread, m.scale, training=m.training)))


@net((IMAGE,), lambda: {"a": conv(3, 8), "f": nn.LayerNorm(8), "b": nn.Linear(8, 3)}, {"a": 8})
def channels_last_norm(m: Net, x: Tensor) -> Tensor:
    return m.b(m.f(F.gelu(m.a(x)).permute(0, 2, 3, 1)))


@net((IMAGE,), lambda: {"a": conv(3, 8), "f": nn.LayerNorm([8, 8, 8]), "b": conv(8, 3)}, {"a": 8})
def layer_norm_over_a_picture(m: Net, x: Tensor) -> Tensor:
    return m.b(m.f(F.gelu(m.a(x))))
