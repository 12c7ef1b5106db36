"""Image data sets with domains, split so that what is tested has never been seen."""

from secateur.data.benchmarks import BENCHMARKS, Benchmark
from secateur.data.digits import digits_dg, save_contact_sheet
from secateur.data.folder import domain_folder
from secateur.data.manifest import Manifest
from secateur.data.pictures import loader_options
from secateur.data.preparation import prepare
from secateur.data.protocol import (
    CROSS_VALIDATION,
    DOMAINBED,
    IID_POOLED,
    LEAVE_ONE_OUT,
    OFFICIAL,
    ORACLE,
    TRAINING_DOMAIN,
    WITHIN_TRAIN,
    DataConfig,
    LabelledImages,
    Split,
    TensorImages,
)
from secateur.data.registry import DATASETS, cross_validation, load_split
from secateur.data.stored import save_split

__all__ = [
    "BENCHMARKS",
    "CROSS_VALIDATION",
    "DATASETS",
    "DOMAINBED",
    "IID_POOLED",
    "LEAVE_ONE_OUT",
    "OFFICIAL",
    "ORACLE",
    "TRAINING_DOMAIN",
    "WITHIN_TRAIN",
    "Benchmark",
    "DataConfig",
    "LabelledImages",
    "Manifest",
    "Split",
    "TensorImages",
    "cross_validation",
    "digits_dg",
    "domain_folder",
    "load_split",
    "loader_options",
    "prepare",
    "save_contact_sheet",
    "save_split",
]
