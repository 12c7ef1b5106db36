"""What a row of the tables of transformers architectures is, what models take, and the configurations that rows share.

Widths differ from one another wherever an architecture lets them, so that nothing lines up by coincidence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Inputs = Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Row:
    """One architecture: its class in transformers, options of its configuration, and its inputs."""

    name: str
    model: str
    options: dict[str, Any]
    inputs: Inputs


def images(height: int, width: int | None = None) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, height, width or height)}


def videos(name: str, frames: int, size: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(2, frames, 3, size, size)}


def patches(rows: int, columns: int, width: int) -> dict[str, torch.Tensor]:
    """Two images cut into patches beforehand, as SigLIP 2 takes them."""
    count = rows * columns
    return {
        "pixel_values": torch.randn(2, count, width),
        "pixel_attention_mask": torch.ones(2, count, dtype=torch.long),
        "spatial_shapes": torch.tensor([[rows, columns]] * 2),
    }


def colours(count: int, palette: int) -> dict[str, torch.Tensor]:
    """Two images as sequences of palette indices, as ImageGPT takes them."""
    return {"input_ids": torch.randint(palette, (2, count))}


def prompted(size: int) -> dict[str, torch.Tensor]:
    """Two images with one point to segment at, as SAM takes them."""
    return {**images(size), "input_points": torch.rand(2, 1, 1, 2) * size}


def with_task(size: int, length: int) -> dict[str, torch.Tensor]:
    """Two images with a task in tokens, as OneFormer takes them."""
    return {**images(size), "task_inputs": torch.randint(100, (2, length))}


def with_text(size: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Two images with a text each."""
    ids = torch.randint(3, vocabulary, (2, length))
    return {**images(size), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_depth(size: int, depth_size: int) -> dict[str, torch.Tensor]:
    """Two images with coarse depth maps as prompts."""
    return {**images(size), "prompt_depth": torch.rand(2, 1, depth_size, depth_size)}


def with_experts(height: int, width: int) -> dict[str, torch.Tensor]:
    """Two images with the index of the data set, that is the expert, that each belongs to."""
    return {**images(height, width), "dataset_index": torch.tensor([0, 1])}


def with_example(height: int, width: int) -> dict[str, torch.Tensor]:
    """Two images with an example image and its mask each, as SegGPT takes them."""
    shape = (2, 3, height, width)
    return {name: torch.randn(shape) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


def rows_of_patches(images_: int, height: int, width: int, patch: int) -> dict[str, torch.Tensor]:
    """Images as one sequence of patches, as the tower of Qwen2-VL takes them."""
    grid = torch.tensor([[1, height, width]] * images_)
    return {"hidden_states": torch.randn(images_ * height * width, patch), "grid_thw": grid}


SMALL, LARGE = partial(images, 64), partial(images, 128)

VIT: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "image_size": 64,
    "patch_size": 16,
}
DINO: dict[str, Any] = {k: v for k, v in VIT.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
FOUR_LAYERS: dict[str, Any] = {"num_hidden_layers": 4}
SWIN: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 2,
    "embed_dim": 24,
    "depths": [2, 2, 2],
    "num_heads": [2, 4, 8],
    "window_size": 4,
}
PYRAMID: dict[str, Any] = {
    "hidden_sizes": [16, 32, 60, 96],
    "num_attention_heads": [1, 2, 5, 8],
    "depths": [1, 2, 1, 1],
}
STAGES: dict[str, Any] = {"hidden_sizes": [24, 40, 72, 112], "depths": [1, 2, 2, 1]}
RESNET: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 2, 2, 1]}
LAST_STAGES = {"out_features": ["stage2", "stage3", "stage4"]}
ALL_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
RESNET_BACKBONE = {"model_type": "resnet", **RESNET}
RT_RESNET_BACKBONE = {"model_type": "rt_detr_resnet", **RESNET, **LAST_STAGES}
DINO_BACKBONE = {"model_type": "dinov2", **DINO, **FOUR_LAYERS, **ALL_STAGES, "reshape_hidden_states": False}
BEIT: dict[str, Any] = VIT | {"use_relative_position_bias": True, "drop_path_rate": 0.1}
BEIT_SEGMENTER = BEIT | FOUR_LAYERS | {"out_indices": [1, 2, 3, 4], "auxiliary_channels": 40}
DETR: dict[str, Any] = {
    "backbone_config": RESNET_BACKBONE | {"out_features": ["stage4"]},
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 112,
    "num_queries": 10,
}
RT_DETR: dict[str, Any] = {
    "backbone_config": RT_RESNET_BACKBONE,
    "encoder_in_channels": [64, 96, 128],
    "encoder_hidden_dim": 48,
    "encoder_ffn_dim": 80,
    "encoder_attention_heads": 4,
    "d_model": 64,
    "decoder_in_channels": [48, 48, 48],
    "decoder_ffn_dim": 96,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
    "num_queries": 10,
}
MASKED: dict[str, Any] = {
    "backbone_config": {
        "model_type": "swin",
        **SWIN,
        "depths": [1, 1, 1, 1],
        "num_heads": [2, 2, 4, 4],
        **ALL_STAGES,
    },
    "num_attention_heads": 4,
    "hidden_dim": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_feedforward_dim": 80,
    "dim_feedforward": 96,
    "num_queries": 10,
}
NECK: dict[str, Any] = {"neck_hidden_sizes": [16, 24, 40, 56], "fusion_hidden_size": 32}
SAM_VISION: dict[str, Any] = VIT | {
    "mlp_dim": 160,
    "output_channels": 48,
    "num_pos_feats": 24,
    "window_size": 3,
    "global_attn_indexes": [1],
}
SAM: dict[str, Any] = {
    "vision_config": SAM_VISION,
    "prompt_encoder_config": {"hidden_size": 48, "image_size": 64, "patch_size": 16, "mask_input_channels": 16},
    "mask_decoder_config": {"hidden_size": 48, "num_attention_heads": 4, "mlp_dim": 80, "iou_head_hidden_dim": 40},
}
SAM2_BACKBONE: dict[str, Any] = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 16,
    "num_attention_heads": 1,
    "image_size": [128, 128],
    "blocks_per_stage": [1, 2, 2, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 4, 2],
    "global_attention_blocks": [4],
}
TEXT: dict[str, Any] = {
    "hidden_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "vocab_size": 100,
}
CLIP: dict[str, Any] = {"vision_config": VIT, "text_config": TEXT | {"eos_token_id": 2}, "projection_dim": 72}
