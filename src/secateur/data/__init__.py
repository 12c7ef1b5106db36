"""Image data sets with domains, split so that what is tested has never been seen."""

from secateur.data.digits import digits_dg, save_contact_sheet
from secateur.data.folder import domain_folder
from secateur.data.protocol import IID_POOLED, LEAVE_ONE_OUT, DataConfig, LabelledImages, Split, TensorImages
from secateur.data.registry import DATASETS, load_split

__all__ = [
    "DATASETS",
    "IID_POOLED",
    "LEAVE_ONE_OUT",
    "DataConfig",
    "LabelledImages",
    "Split",
    "TensorImages",
    "digits_dg",
    "domain_folder",
    "load_split",
    "save_contact_sheet",
]
