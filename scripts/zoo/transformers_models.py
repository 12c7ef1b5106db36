"""Vision architectures of transformers, built with random weights from small but structurally faithful configurations.

Each row of the table names the class, what differs from the defaults of its configuration, and what it takes. Widths
differ from one another wherever the architecture lets them, so that nothing lines up by coincidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from zoo.catalogue import Entry

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


_VIT: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "image_size": 64,
    "patch_size": 16,
}
_DINO: dict[str, Any] = {k: v for k, v in _VIT.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
_FOUR_LAYERS: dict[str, Any] = {"num_hidden_layers": 4}
_SWIN: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 2,
    "embed_dim": 24,
    "depths": [2, 2, 2],
    "num_heads": [2, 4, 8],
    "window_size": 4,
}
_PYRAMID: dict[str, Any] = {
    "hidden_sizes": [16, 32, 60, 96],
    "num_attention_heads": [1, 2, 5, 8],
    "depths": [1, 2, 1, 1],
}
_STAGES: dict[str, Any] = {"hidden_sizes": [24, 40, 72, 112], "depths": [1, 2, 2, 1]}
_RESNET: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 2, 2, 1]}
_LAST_STAGES = {"out_features": ["stage2", "stage3", "stage4"]}
_ALL_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
_RESNET_BACKBONE = {"model_type": "resnet", **_RESNET}
_RT_RESNET_BACKBONE = {"model_type": "rt_detr_resnet", **_RESNET, **_LAST_STAGES}
_DINO_BACKBONE = {"model_type": "dinov2", **_DINO, **_FOUR_LAYERS, **_ALL_STAGES, "reshape_hidden_states": False}
_BEIT: dict[str, Any] = _VIT | {"use_relative_position_bias": True, "drop_path_rate": 0.1}
_BEIT_SEGMENTER = _BEIT | _FOUR_LAYERS | {"out_indices": [1, 2, 3, 4], "auxiliary_channels": 40}
_DETR: dict[str, Any] = {
    "backbone_config": _RESNET_BACKBONE | {"out_features": ["stage4"]},
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 112,
    "num_queries": 10,
}
_RT_DETR: dict[str, Any] = {
    "backbone_config": _RT_RESNET_BACKBONE,
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
_MASKED: dict[str, Any] = {
    "backbone_config": {
        "model_type": "swin",
        **_SWIN,
        "depths": [1, 1, 1, 1],
        "num_heads": [2, 2, 4, 4],
        **_ALL_STAGES,
    },
    "num_attention_heads": 4,
    "hidden_dim": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_feedforward_dim": 80,
    "dim_feedforward": 96,
    "num_queries": 10,
}
_NECK: dict[str, Any] = {"neck_hidden_sizes": [16, 24, 40, 56], "fusion_hidden_size": 32}
_SAM_VISION: dict[str, Any] = _VIT | {
    "mlp_dim": 160,
    "output_channels": 48,
    "num_pos_feats": 24,
    "window_size": 3,
    "global_attn_indexes": [1],
}
_SAM: dict[str, Any] = {
    "vision_config": _SAM_VISION,
    "prompt_encoder_config": {"hidden_size": 48, "image_size": 64, "patch_size": 16, "mask_input_channels": 16},
    "mask_decoder_config": {"hidden_size": 48, "num_attention_heads": 4, "mlp_dim": 80, "iou_head_hidden_dim": 40},
}
_SAM2_BACKBONE: dict[str, Any] = {
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
_TEXT: dict[str, Any] = {
    "hidden_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "vocab_size": 100,
}
_CLIP: dict[str, Any] = {"vision_config": _VIT, "text_config": _TEXT | {"eos_token_id": 2}, "projection_dim": 72}

_small, _large = partial(images, 64), partial(images, 128)

CLASSIFICATION = (
    Row("vit", "ViTForImageClassification", _VIT, _small),
    Row("vit-pooled", "ViTModel", _VIT | {"pooler_output_size": 72}, _small),
    Row("vit-masked-image", "ViTForMaskedImageModeling", _VIT, _small),
    Row("deit", "DeiTForImageClassification", _VIT, _small),
    Row("deit-teacher", "DeiTForImageClassificationWithTeacher", _VIT, _small),
    Row("beit", "BeitForImageClassification", _BEIT, _small),
    Row(
        "beit-shared-bias",
        "BeitForImageClassification",
        _BEIT | {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
        _small,
    ),
    Row("data2vec", "Data2VecVisionForImageClassification", _BEIT, _small),
    Row("swin", "SwinForImageClassification", _SWIN, _small),
    Row("swinv2", "Swinv2ForImageClassification", _SWIN | {"pretrained_window_sizes": [0, 0, 0]}, _small),
    Row("dinov2", "Dinov2ForImageClassification", _DINO, _small),
    Row("dinov2-swiglu", "Dinov2ForImageClassification", _DINO | {"use_swiglu_ffn": True}, _small),
    Row("dinov2-registers", "Dinov2WithRegistersForImageClassification", _DINO, _small),
    Row("convnext", "ConvNextForImageClassification", _STAGES, _small),
    Row("convnextv2", "ConvNextV2ForImageClassification", _STAGES, _small),
    Row("segformer", "SegformerForImageClassification", _PYRAMID, _small),
    Row(
        "mobilevit",
        "MobileViTForImageClassification",
        {
            "hidden_sizes": [48, 64, 80],
            "neck_hidden_sizes": [8, 16, 24, 32, 40, 56, 96],
            "image_size": 64,
        },
        _small,
    ),
    Row(
        "mobilevitv2",
        "MobileViTV2ForImageClassification",
        {"image_size": 64, "n_attn_blocks": [1, 2, 1], "base_attn_unit_dims": [32, 48, 64], "width_multiplier": 0.5},
        _small,
    ),
    Row("mobilenet_v1", "MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}, _small),
    Row("mobilenet_v2", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.35}, _small),
    Row(
        "levit",
        "LevitForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 4, 6],
            "depths": [2, 2, 2],
            "key_dim": [8, 8, 8],
        },
        _small,
    ),
    Row(
        "levit-teacher",
        "LevitForImageClassificationWithTeacher",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 4, 6], "depths": [1, 1, 1]},
        _small,
    ),
    Row("pvt", "PvtForImageClassification", _PYRAMID | {"image_size": 64}, _small),
    Row("pvt_v2", "PvtV2ForImageClassification", _PYRAMID | {"image_size": [64, 64]}, _small),
    Row(
        "pvt_v2-linear",
        "PvtV2ForImageClassification",
        _PYRAMID | {"image_size": [64, 64], "linear_attention": True},
        _small,
    ),
    Row("cvt", "CvtForImageClassification", {"embed_dim": [16, 48, 96], "depth": [1, 2, 3]}, _small),
    Row(
        "hiera",
        "HieraForImageClassification",
        {"embed_dim": 16, "image_size": [128, 128], "depths": [1, 2, 2, 1], "masked_unit_size": [8, 8]},
        _large,
    ),
    Row("poolformer", "PoolFormerForImageClassification", _STAGES, _small),
    Row(
        "focalnet",
        "FocalNetForImageClassification",
        {"image_size": 64, "embed_dim": 16, "depths": [1, 2, 2, 1], "hidden_sizes": [32, 64, 128, 128]},
        _small,
    ),
    Row(
        "focalnet-post-norm",
        "FocalNetForImageClassification",
        {
            "image_size": 64,
            "embed_dim": 16,
            "depths": [1, 2, 2, 1],
            "hidden_sizes": [32, 64, 128, 128],
            "use_conv_embed": True,
            "use_post_layernorm": True,
            "use_layerscale": True,
            "normalize_modulator": True,
        },
        _small,
    ),
    Row(
        "efficientnet",
        "EfficientNetForImageClassification",
        {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 640},
        _small,
    ),
    Row("regnet-y", "RegNetForImageClassification", _RESNET | {"groups_width": 16}, _small),
    Row("regnet-x", "RegNetForImageClassification", _RESNET | {"groups_width": 16, "layer_type": "x"}, _small),
    Row("resnet", "ResNetForImageClassification", _RESNET, _small),
    Row("resnet-basic", "ResNetForImageClassification", _RESNET | {"layer_type": "basic"}, _small),
    Row("bit", "BitForImageClassification", _RESNET | {"num_groups": 8}, _small),
    Row("bit-bottleneck", "BitForImageClassification", _RESNET | {"num_groups": 8, "layer_type": "bottleneck"}, _small),
    Row("vit_msn", "ViTMSNForImageClassification", _VIT, _small),
    Row("ijepa", "IJepaForImageClassification", _VIT, _small),
    Row("clip", "CLIPForImageClassification", _CLIP, _small),
    Row("metaclip_2", "MetaClip2ForImageClassification", _CLIP, _small),
    Row("siglip", "SiglipForImageClassification", {"vision_config": _VIT, "text_config": _TEXT}, _small),
    Row(
        "siglip2",
        "Siglip2ForImageClassification",
        {"vision_config": {k: v for k, v in _VIT.items() if k != "image_size"} | {"num_patches": 16}},
        partial(patches, 4, 4, 768),
    ),
    Row(
        "textnet",
        "TextNetForImageClassification",
        {"stem_out_channels": 16, "hidden_sizes": [16, 24, 32, 48, 64]},
        _small,
    ),
    Row("timm_wrapper", "TimmWrapperForImageClassification", {"architecture": "resnet18"}, _small),
    Row(
        "swiftformer",
        "SwiftFormerForImageClassification",
        {"depths": [1, 2, 2, 1], "embed_dims": [16, 24, 48, 96], "image_size": 64},
        _small,
    ),
    Row(
        "perceiver",
        "PerceiverForImageClassificationLearned",
        {"image_size": 16, "num_latents": 12, "d_latents": 64, "num_self_attends_per_block": 2},
        partial(images, 16),
    ),
    Row(
        "imagegpt",
        "ImageGPTForImageClassification",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 33},
        partial(colours, 64, 32),
    ),
    Row(
        "hgnet_v2",
        "HGNetV2ForImageClassification",
        {
            "stem_channels": [3, 16, 24],
            "stage_in_channels": [24, 48, 96, 128],
            "stage_mid_channels": [16, 24, 32, 48],
            "stage_out_channels": [48, 96, 128, 160],
            "stage_num_blocks": [1, 1, 2, 1],
            "stage_numb_of_layers": [2, 2, 3, 2],
            "embedding_size": 24,
            "hidden_sizes": [48, 96, 128, 160],
        },
        _small,
    ),
    Row("pp_lcnet", "PPLCNetForImageClassification", {"scale": 0.5, "class_expand": 96}, _small),
)

BACKBONES = (
    Row(
        "vit_mae",
        "ViTMAEForPreTraining",
        _VIT
        | {
            "decoder_hidden_size": 64,
            "decoder_num_attention_heads": 4,
            "decoder_num_hidden_layers": 2,
            "decoder_intermediate_size": 80,
        },
        _small,
    ),
    Row("swin-backbone", "SwinBackbone", _SWIN | {"out_features": ["stage1", "stage3"]}, _small),
    Row("maskformer_swin-backbone", "MaskFormerSwinBackbone", _SWIN | {"out_features": ["stage1", "stage3"]}, _small),
    Row(
        "swin2sr",
        "Swin2SRForImageSuperResolution",
        {"image_size": 32, "embed_dim": 24, "depths": [2, 2], "num_heads": [4, 4], "window_size": 4},
        partial(images, 32),
    ),
    Row("dinov3_vit", "DINOv3ViTModel", _VIT | {"num_register_tokens": 4}, _small),
    Row("dinov3_vit-gated", "DINOv3ViTModel", _VIT | {"num_register_tokens": 4, "use_gated_mlp": True}, _small),
    Row("dinov3_convnext", "DINOv3ConvNextModel", _STAGES, _small),
    Row(
        "vitdet",
        "VitDetBackbone",
        _DINO
        | {
            "pretrain_image_size": 64,
            "window_block_indices": [0],
            "residual_block_indices": [1],
            "use_relative_position_embeddings": True,
            "window_size": 3,
        },
        _small,
    ),
    Row("clip-vision", "CLIPVisionModelWithProjection", _VIT | {"projection_dim": 72}, _small),
    Row("chinese_clip-vision", "ChineseCLIPVisionModel", _VIT, _small),
    Row("altclip-vision", "AltCLIPVisionModel", _VIT, _small),
    Row("siglip-vision", "SiglipVisionModel", _VIT, _small),
    Row("blip-vision", "BlipVisionModel", _VIT, _small),
    Row("git-vision", "GitVisionModel", _VIT, _small),
    Row("flava-image", "FlavaImageModel", _VIT, _small),
    Row(
        "groupvit-vision",
        "GroupViTVisionModel",
        {
            "hidden_size": 96,
            "intermediate_size": 160,
            "depths": [2, 2, 1],
            "num_hidden_layers": 5,
            "num_group_tokens": [8, 4, 0],
            "num_output_groups": [8, 4, 4],
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
        },
        _small,
    ),
    Row("owlvit-vision", "OwlViTVisionModel", _VIT, _small),
    Row("mlcd-vision", "MLCDVisionModel", _VIT, _small),
    Row("aimv2-vision", "Aimv2VisionModel", _VIT, _small),
    Row("pixtral-vision", "PixtralVisionModel", _VIT | {"head_dim": 24}, _small),
    Row(
        "internvl-vision",
        "InternVLVisionModel",
        _VIT | {"image_size": [64, 64], "patch_size": [16, 16], "use_qk_norm": True, "norm_type": "rms_norm"},
        _small,
    ),
    Row("radio", "RadioModel", _DINO | {"mlp_ratio": 2.0, "max_img_size": 64, "num_registers": 3}, _small),
    Row("pixio", "PixioModel", _DINO, _small),
    Row("tipsv2-vision", "Tipsv2VisionModel", _DINO, _small),
    Row(
        "florence2-vision",
        "Florence2VisionBackbone",
        {
            "depths": [1, 1, 2, 1],
            "embed_dim": [16, 32, 64, 96],
            "num_heads": [2, 4, 8, 8],
            "num_groups": [2, 4, 8, 8],
            "window_size": 4,
        },
        lambda: {"hidden_states": torch.randn(2, 3, 64, 64)},
    ),
    Row(
        "vjepa2",
        "VJEPA2ForVideoClassification",
        {
            "hidden_size": 96,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "mlp_ratio": 2.0,
            "crop_size": 32,
            "frames_per_clip": 4,
            "num_pooler_layers": 2,
            "pred_hidden_size": 48,
            "pred_num_attention_heads": 4,
            "pred_num_hidden_layers": 2,
        },
        partial(videos, "pixel_values_videos", 4, 32),
    ),
    Row(
        "videomae",
        "VideoMAEForVideoClassification",
        _VIT | {"image_size": 32, "num_frames": 4},
        partial(videos, "pixel_values", 4, 32),
    ),
    Row(
        "vivit",
        "VivitForVideoClassification",
        {k: v for k, v in _VIT.items() if k != "patch_size"} | {"image_size": 32, "num_frames": 4},
        partial(videos, "pixel_values", 4, 32),
    ),
    Row(
        "timesformer",
        "TimesformerForVideoClassification",
        _VIT | {"image_size": 32, "num_frames": 4},
        partial(videos, "pixel_values", 4, 32),
    ),
    Row(
        "qwen2_vl-vision",
        "models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        {"depth": 2, "embed_dim": 96, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 112},
        partial(rows_of_patches, 2, 4, 4, 1176),
    ),
    Row("rt_detr_resnet", "RTDetrResNetBackbone", _RESNET | _LAST_STAGES, _small),
    Row("pp_lcnet_v3", "PPLCNetV3Backbone", {"scale": 0.5}, _small),
    Row(
        "superpoint",
        "SuperPointForKeypointDetection",
        {"encoder_hidden_sizes": [16, 24, 32, 40], "decoder_hidden_size": 48, "descriptor_decoder_dim": 56},
        _small,
    ),
    Row(
        "mgp_str",
        "MgpstrForSceneTextRecognition",
        {
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_bpe_labels": 60,
            "num_wordpiece_labels": 70,
        },
        partial(images, 32, 128),
    ),
)

DETECTION = (
    Row("detr", "DetrForObjectDetection", _DETR, _large),
    Row(
        "detr-segmentation",
        "DetrForSegmentation",
        _DETR
        | {
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "backbone_config": _RESNET_BACKBONE | _ALL_STAGES,
        },
        _large,
    ),
    Row("conditional_detr", "ConditionalDetrForObjectDetection", _DETR, _large),
    Row("table_transformer", "TableTransformerForObjectDetection", _DETR, _large),
    Row(
        "dab_detr",
        "DabDetrForObjectDetection",
        {k: v for k, v in _DETR.items() if k != "d_model"} | {"hidden_size": 64},
        _large,
    ),
    Row(
        "deformable_detr",
        "DeformableDetrForObjectDetection",
        _DETR | {"backbone_config": _RESNET_BACKBONE | _LAST_STAGES, "disable_custom_kernels": True},
        _large,
    ),
    Row(
        "deformable_detr-two-stage",
        "DeformableDetrForObjectDetection",
        _DETR
        | {
            "backbone_config": _RESNET_BACKBONE | _LAST_STAGES,
            "disable_custom_kernels": True,
            "two_stage": True,
            "with_box_refine": True,
            "two_stage_num_proposals": 10,
        },
        _large,
    ),
    Row("rt_detr", "RTDetrForObjectDetection", _RT_DETR, _large),
    Row("rt_detr_v2", "RTDetrV2ForObjectDetection", _RT_DETR, _large),
    Row("d_fine", "DFineForObjectDetection", _RT_DETR | {"d_model": 48, "lqe_hidden_dim": 24}, _large),
    Row(
        "lw_detr",
        "LwDetrForObjectDetection",
        {
            "backbone_config": {
                "model_type": "lw_detr_vit",
                **_DINO,
                "num_windows": 4,
                "num_windows_side": 2,
                "window_block_indices": [0],
                "out_features": ["stage1", "stage2"],
            },
            "projector_scale_factors": [1.0],
            "projector_out_channels": 64,
            "d_model": 64,
            "decoder_layers": 2,
            "decoder_self_attention_heads": 4,
            "decoder_cross_attention_heads": 4,
            "decoder_ffn_dim": 96,
            "num_queries": 10,
            "group_detr": 2,
        },
        _small,
    ),
    Row("yolos", "YolosForObjectDetection", _VIT | {"image_size": [64, 64], "num_detection_tokens": 10}, _small),
    Row(
        "owlvit",
        "OwlViTForObjectDetection",
        {"vision_config": _VIT, "text_config": _TEXT | {"hidden_size": 80}, "projection_dim": 80},
        partial(with_text, 64, 8, 90),
    ),
)

SEGMENTATION = (
    Row("beit-segmentation", "BeitForSemanticSegmentation", _BEIT_SEGMENTER, _small),
    Row("data2vec-segmentation", "Data2VecVisionForSemanticSegmentation", _BEIT_SEGMENTER, _small),
    Row("segformer-segmentation", "SegformerForSemanticSegmentation", _PYRAMID | {"decoder_hidden_size": 48}, _small),
    Row(
        "mobilevit-segmentation",
        "MobileViTForSemanticSegmentation",
        {
            "hidden_sizes": [48, 64, 80],
            "neck_hidden_sizes": [8, 16, 24, 32, 40, 56, 96],
            "image_size": 64,
            "output_stride": 16,
            "aspp_out_channels": 48,
        },
        _large,
    ),
    Row(
        "mobilevitv2-segmentation",
        "MobileViTV2ForSemanticSegmentation",
        {
            "image_size": 64,
            "n_attn_blocks": [1, 2, 1],
            "base_attn_unit_dims": [32, 48, 64],
            "width_multiplier": 0.5,
            "aspp_out_channels": 48,
        },
        _large,
    ),
    Row(
        "mobilenet_v2-segmentation",
        "MobileNetV2ForSemanticSegmentation",
        {"depth_multiplier": 0.35, "output_stride": 16},
        _large,
    ),
    Row(
        "mask2former",
        "Mask2FormerForUniversalSegmentation",
        _MASKED | {"feature_size": 64, "mask_feature_size": 64},
        _large,
    ),
    Row(
        "maskformer",
        "MaskFormerForInstanceSegmentation",
        {
            "backbone_config": _MASKED["backbone_config"],
            "decoder_config": {"model_type": "detr", **{k: v for k, v in _DETR.items() if k != "backbone_config"}},
            "fpn_feature_size": 64,
            "mask_feature_size": 56,
        },
        _large,
    ),
    Row(
        "oneformer",
        "OneFormerForUniversalSegmentation",
        _MASKED | {"conv_dim": 64, "mask_dim": 64, "text_encoder_width": 64},
        partial(with_task, 128, 77),
    ),
    Row("eomt", "EomtForUniversalSegmentation", _DINO | _FOUR_LAYERS | {"num_blocks": 2, "num_queries": 10}, _small),
    Row(
        "eomt_dinov3",
        "EomtDinov3ForUniversalSegmentation",
        _VIT | _FOUR_LAYERS | {"num_blocks": 2, "num_queries": 10},
        _small,
    ),
    Row(
        "upernet",
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": {"model_type": "convnext", **_STAGES, **_ALL_STAGES},
            "hidden_size": 48,
            "auxiliary_channels": 40,
            "auxiliary_in_channels": 72,
        },
        _large,
    ),
    Row("sam-vision", "SamVisionModel", _SAM_VISION, _small),
    Row("sam", "SamModel", _SAM, partial(prompted, 64)),
    Row("sam_hq-vision", "SamHQVisionModel", _SAM_VISION, _small),
    Row(
        "sam2-vision",
        "Sam2VisionModel",
        {
            "backbone_config": _SAM2_BACKBONE,
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "fpn_hidden_size": 48,
        },
        _large,
    ),
    Row(
        "sam3-vit",
        "Sam3ViTModel",
        _VIT | {"pretrain_image_size": 32, "window_size": 2, "global_attn_indexes": [1]},
        _small,
    ),
    Row(
        "seggpt",
        "SegGptForImageSegmentation",
        {
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "mlp_dim": 160,
            "image_size": [64, 32],
            "pretrain_image_size": 64,
            "decoder_hidden_size": 24,
            "intermediate_hidden_state_indices": [0, 1, 2, 3],
            "merge_index": 0,
        },
        partial(with_example, 32, 32),
    ),
    Row(
        "sapiens2-segmentation",
        "Sapiens2ForSemanticSegmentation",
        _VIT
        | {
            "num_key_value_heads_per_layer": [4, 2],
            "num_register_tokens": 2,
            "head_config": {"upsample_out_channels": [48, 40], "conv_out_channels": [32]},
        },
        _small,
    ),
)

DENSE = (
    Row("dpt", "DPTForDepthEstimation", _VIT | _FOUR_LAYERS | _NECK | {"backbone_out_indices": [0, 1, 2, 3]}, _small),
    Row(
        "dpt-segmentation",
        "DPTForSemanticSegmentation",
        _VIT | _FOUR_LAYERS | _NECK | {"backbone_out_indices": [0, 1, 2, 3]},
        _small,
    ),
    Row(
        "depth_anything",
        "DepthAnythingForDepthEstimation",
        _NECK
        | {"backbone_config": _DINO_BACKBONE, "patch_size": 16, "reassemble_hidden_size": 96, "head_hidden_size": 24},
        _small,
    ),
    Row(
        "prompt_depth_anything",
        "PromptDepthAnythingForDepthEstimation",
        _NECK
        | {"backbone_config": _DINO_BACKBONE, "patch_size": 16, "reassemble_hidden_size": 96, "head_hidden_size": 24},
        partial(with_depth, 64, 16),
    ),
    Row("glpn", "GLPNForDepthEstimation", _PYRAMID | {"decoder_hidden_size": 24}, _small),
    Row(
        "zoedepth",
        "ZoeDepthForDepthEstimation",
        _NECK
        | {
            "backbone_config": {
                "model_type": "beit",
                **_BEIT,
                **_FOUR_LAYERS,
                **_ALL_STAGES,
                "reshape_hidden_states": False,
            },
            "bottleneck_features": 32,
            "num_relative_features": 16,
            "bin_embedding_dim": 24,
        },
        _small,
    ),
    Row(
        "vitpose",
        "VitPoseForPoseEstimation",
        {
            "backbone_config": {
                "model_type": "vitpose_backbone",
                **_DINO,
                "image_size": [64, 48],
                "patch_size": [16, 16],
            }
        },
        partial(images, 64, 48),
    ),
    Row(
        "vitpose-classic",
        "VitPoseForPoseEstimation",
        {
            "backbone_config": {
                "model_type": "vitpose_backbone",
                **_DINO,
                "image_size": [64, 48],
                "patch_size": [16, 16],
            },
            "use_simple_decoder": False,
        },
        partial(images, 64, 48),
    ),
    Row(
        "vitpose-experts",
        "VitPoseForPoseEstimation",
        {
            "backbone_config": {
                "model_type": "vitpose_backbone",
                **_DINO,
                "image_size": [64, 48],
                "patch_size": [16, 16],
                "num_experts": 2,
                "part_features": 32,
            }
        },
        partial(with_experts, 64, 48),
    ),
    Row(
        "vitmatte",
        "VitMatteForImageMatting",
        {
            "backbone_config": {
                "model_type": "vitdet",
                **_DINO,
                "num_channels": 4,
                "pretrain_image_size": 64,
                "out_features": ["stage2"],
            },
            "hidden_size": 96,
            "convstream_hidden_sizes": [16, 24, 32],
            "fusion_hidden_sizes": [48, 40, 24, 16],
        },
        lambda: {"pixel_values": torch.randn(2, 4, 64, 64)},
    ),
    Row(
        "uvdoc",
        "UVDocModel",
        {"backbone_config": {"model_type": "uvdoc_backbone", "out_features": [f"stage{i}" for i in range(1, 7)]}},
        _large,
    ),
)


def build(row: Row) -> nn.Module:
    """Builds the model of a row with random weights."""
    model: Any = transformers
    for part in row.model.split("."):
        model = getattr(model, part)
    return model(model.config_class(**row.options))


def transformers_architectures() -> Iterator[Entry]:
    """Yields every architecture of the table; the family is the name of the model's package in transformers."""
    for row in (*CLASSIFICATION, *BACKBONES, *DETECTION, *SEGMENTATION, *DENSE):
        family = row.name.split("-")[0]
        yield Entry(row.name, "transformers", family, partial(build, row), lambda _, row=row: row.inputs())
