"""Fine-tuning and evaluation of image classifiers."""

from secateur.training.augmentation import AugmentConfig
from secateur.training.batches import calibration_batches, calibration_by_domain, logits_of
from secateur.training.checkpoint import CheckpointConfig
from secateur.training.config import (
    AveragingConfig,
    DistillationConfig,
    FinetuneConfig,
    MachineConfig,
    ObjectiveConfig,
)
from secateur.training.evaluation import evaluate
from secateur.training.finetuning import finetune_
from secateur.training.interruption import EXIT_INTERRUPTED, Interrupted
from secateur.training.presentation import presented
from secateur.training.progress import FinetuneProgress, Tick
from secateur.training.records import EpochRecord, FinetuneRecord
from secateur.training.tracking import LogConfig

__all__ = [
    "EXIT_INTERRUPTED",
    "AugmentConfig",
    "AveragingConfig",
    "CheckpointConfig",
    "DistillationConfig",
    "EpochRecord",
    "FinetuneConfig",
    "FinetuneProgress",
    "FinetuneRecord",
    "Interrupted",
    "LogConfig",
    "MachineConfig",
    "ObjectiveConfig",
    "Tick",
    "calibration_batches",
    "calibration_by_domain",
    "evaluate",
    "finetune_",
    "logits_of",
    "presented",
]
