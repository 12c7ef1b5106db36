"""Presets: the settings of Isomorphic Pruning (arXiv 2407.04616) as ready requests.

    preset = find_preset("deit-4.2g")
    model = timm.create_model(preset.model, pretrained=True)
    plan = secateur.prune_(model, x, criterion=preset.criterion, batches=batches, **preset.request)

A setting fixes how many channels go from each family. In DeiT all groups of a family cost the same, so that fixes the
cost as well. In Swin and convolutional networks a family reaches through all stages, and the cost depends on which of
them the scores favour; `Preset.budget` asks for the published MACs instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from secateur.errors import unknown_name


@dataclass(frozen=True)
class Preset:
    """A setting: the timm model to start from, what to ask of `allocate`, and what was published for the result.

    `macs` (per image of 224 x 224) and `params` (None where only the MACs are known to us) are the published figures;
    the authors' counter, with norms, activations and biases, differs from this package's by up to 3 %. `num_samples`
    is how many training images they took gradients of. Of the residual branches that match `branches`, `num_dropped`
    go before all else, those of least `secateur.surgery.branch_scores`; the authors dropped them after the widths.
    """

    name: str
    model: str
    ratio: float
    macs: int
    params: int | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    num_samples: int = 3200
    branches: str = ""
    num_dropped: int = 0
    criterion: str = "taylor"

    @property
    def request(self) -> dict[str, Any]:
        """The authors' request as arguments of `allocate`: their ratios, ranked inside each family, even widths."""
        return {"ratio": self.ratio, "ratios": dict(self.ratios), "scope": "isomorphic", "round_to": 2}

    @property
    def budget(self) -> dict[str, Any]:
        """The same with the published MACs in place of `ratio`; what `ratios` sets by name stays."""
        return {**self.request, "ratio": None, "macs": self.macs}


_DEIT_B = "deit_base_distilled_patch16_224.fb_in1k"
_DEIT_S = "deit_small_distilled_patch16_224.fb_in1k"
_DEIT_T = "deit_tiny_distilled_patch16_224.fb_in1k"
_SWIN_B = "swin_base_patch4_window7_224.ms_in1k"
_CONVNEXT_B = "convnext_base.fb_in1k"
_M = 10**6
_ALL = (
    # Ratios are those of the authors' scripts; figures of DeiT from Table 2, of Swin from Table 2 of the supplement, of
    # ConvNeXt from the authors' repository, of the others from the names of the settings.
    Preset("deit-4.2g", _DEIT_B, 0.5, 4160 * _M, 20_690_000, {"head_dims": 0.25}),
    Preset("deit-2.6g", _DEIT_B, 0.6, 2620 * _M, 13_070_000, {"head_dims": 0.3}),
    Preset("deit-1.2g", _DEIT_S, 0.5, 1210 * _M, 5_740_000, {"head_dims": 0.1}),
    Preset("deit-0.6g", _DEIT_T, 0.25, 620 * _M, 3_080_000, {"heads": 0.3, "head_dims": 0.3}),
    Preset("swin-4.5g", _SWIN_B, 0.47, 4470 * _M, 24_660_000, {"heads": 0.0, "head_dims": 0.47}),
    Preset("convnext-8.5g", _CONVNEXT_B, 0.26, 8480 * _M, 47_360_000),
    Preset("convnext-4.2g", _CONVNEXT_B, 0.25, 4190 * _M, 25_320_000, branches="stages.2.blocks.*", num_dropped=18),
    Preset("resnet50-2.0g", "resnet50.tv_in1k", 0.26, 2000 * _M),
    Preset("resnet101-4.5g", "resnet101.tv_in1k", 0.22, 4500 * _M, num_samples=6400),
    Preset("resnet101-3.8g", "resnet101.tv_in1k", 0.28, 3800 * _M, num_samples=6400),
    Preset("resnet152-4.0g", "resnet152.tv_in1k", 0.4, 4000 * _M, num_samples=6400),
    # The authors started from torchvision's weights, which timm does not have; the architecture is the same.
    Preset("mobilenetv2-0.15g", "mobilenetv2_100.ra_in1k", 0.27, 150 * _M),
)
PRESETS: Mapping[str, Preset] = MappingProxyType({p.name: p for p in _ALL})
"""All presets by name."""


def find_preset(name: str) -> Preset:
    """Returns the preset called `name`; raises InputError with the nearest names if there is none."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
