"""The complete configuration of one run, and what runs have in common by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from secateur.allocation.allocate import Scope
from secateur.criteria import find_criterion
from secateur.data import DataConfig
from secateur.errors import InputError
from secateur.experiments.reading import build
from secateur.report.provenance import config_hash, plain
from secateur.report.results import RUN_FORMAT, check_format
from secateur.surgery.sources import Weights
from secateur.training import FinetuneConfig

Attention = Literal["heads", "dims", "both"]

ATTENTION: Mapping[Attention, Mapping[str, float | None]] = {
    "heads": {},
    "dims": {"heads": 0.0, "head_dims": None},
    "both": {"head_dims": None},
}
"""What attention loses, as `ratios` of `secateur.allocate`."""


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How many training images of the source domains criteria and compensation look at: batches of `batch_size`."""

    batches: int = 10
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Raises InputError for counts below one."""
        if self.batches < 1 or self.batch_size < 1:
            raise InputError(f"batches and batch_size must be at least 1, found {self.batches} and {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What is removed and by which criterion: `ratio` of the channels, or as much as `macs` (what may remain) asks.

    `scope`, `ratios`, `keep`, `min_channels` and `round_to` go to `secateur.allocate`; `attention` says whether
    attention loses heads, dimensions of all heads, or both. `compensate` refits what is left on the calibration images.
    """

    criterion: str
    ratio: float | None = None
    macs: int | float | None = None
    scope: Scope = "global"
    attention: Attention = "heads"
    ratios: Mapping[str, float] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    min_channels: int | None = None
    round_to: int = 1
    compensate: bool = False
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        """Raises InputError for unknown criteria, values out of range, and requests that contradict each other."""
        find_criterion(self.criterion)
        if (self.ratio is None) == (self.macs is None):
            raise InputError("a run is given either a ratio of channels to remove, or the MACs that may remain")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise InputError(f"a ratio is the fraction of channels to remove, between 0 and 1; found {self.ratio}")
        if self.macs is not None and not (self.macs > 0 and (isinstance(self.macs, int) or self.macs < 1)):
            expected = "a fraction between 0 and 1 or a whole number"
            raise InputError(f"macs is what may remain, {expected}; found {self.macs}")
        if self.scope == "cost" and self.macs is None:
            raise InputError("scope 'cost' weighs scores against a budget; give macs instead of ratios")

    @property
    def amount(self) -> str:
        """How much goes, in words."""
        if self.ratio is not None:
            return f"{self.ratio:.3g}"
        return f"to {self.macs:,} MACs" if isinstance(self.macs, int) else f"to {self.macs:.3g} of MACs"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: a model with its pretrained weights, pruned or (`prune` None) not, fine-tuned, tested on unseen images.

    `model` is a built-in base model, or a timm, Hugging Face (`hf:NAME` or a name with a slash) or torchvision
    (`torchvision:NAME`) name; the latter three get a new head for the classes of the data, which is trained alone for
    `probe_epochs` before anything is scored, since criteria that look at gradients learn nothing from a random head.
    `data` is a data set by name, or its folder. `seed` draws calibration images, random scores, the new head and the
    order of fine-tuning; the split has its own in `split`. Image size, mean and standard deviation are the model's
    own unless `split` sets them. Latency is timed on `latency_batch` images.
    """

    model: str
    data: str
    seed: int = 0
    weights: Weights = "pretrained"
    split: DataConfig = field(default_factory=DataConfig)
    probe_epochs: int = 0
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    prune: PruneConfig | None = None
    latency_batch: int = 32

    def __post_init__(self) -> None:
        """Raises InputError for values out of range."""
        limits = (("seed", 0), ("probe_epochs", 0), ("latency_batch", 1))
        for name, least in limits:
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, found {getattr(self, name)}")

    @cached_property
    def hash(self) -> str:
        """12 hexadecimal digits that change whenever anything in the configuration does; names the run's folder."""
        return config_hash(self.to_json())

    @cached_property
    def base_key(self) -> str:
        """What runs have in common that start from the same weights: model, data, split and seed."""
        return config_hash({"base": replace(self, prune=None, finetune=FinetuneConfig(), latency_batch=1)})

    @property
    def score_key(self) -> str:
        """What pruned runs have in common that share their scores; raises InputError for a dense run."""
        if self.prune is None:
            raise InputError("a dense run has no scores")
        return config_hash([self.base_key, self.prune.criterion, self.prune.calibration])

    @cached_property
    def dense(self) -> RunConfig:
        """The baseline of this run: the same without pruning, and without a teacher, for which it may serve."""
        return replace(self, prune=None, finetune=replace(self.finetune, distillation=None))

    @property
    def has_teacher(self) -> bool:
        """Whether the run learns from its dense baseline."""
        return self.finetune.distillation is not None

    @property
    def label(self) -> str:
        """The run in a few words."""
        what = "dense"
        if self.prune is not None:
            what = f"{self.prune.criterion} {self.prune.amount} {self.prune.scope}"
        unseen = f", unseen {self.split.unseen}" if self.split.unseen else ""
        unseen += f", without {self.split.without}" if self.split.without else ""
        return f"{self.model}, {what}, {self.data}{unseen}, seed {self.seed}"

    def to_json(self) -> dict[str, Any]:
        """Returns the configuration as JSON values, with the version of its format."""
        return {"format": RUN_FORMAT} | plain(self)

    @classmethod
    def from_json(cls, content: Any, where: str) -> RunConfig:
        """Returns the configuration that `to_json` wrote; `where` is the file that it comes from.

        Raises:
            DataError: It is of another version.
            InputError: A key or a value is not one of a run.
        """
        check_format(content, where)
        return build(cls, {k: v for k, v in content.items() if k != "format"}, where)
