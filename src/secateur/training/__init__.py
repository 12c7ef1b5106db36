"""Fine-tuning and evaluation of image classifiers."""

from secateur.training.batches import calibration_batches, calibration_by_domain, logits_of
from secateur.training.config import FinetuneConfig
from secateur.training.evaluation import evaluate
from secateur.training.finetuning import EpochRecord, FinetuneRecord, finetune_
from secateur.training.progress import FinetuneProgress, Tick

__all__ = [
    "EpochRecord",
    "FinetuneConfig",
    "FinetuneProgress",
    "FinetuneRecord",
    "Tick",
    "calibration_batches",
    "calibration_by_domain",
    "evaluate",
    "finetune_",
    "logits_of",
]
