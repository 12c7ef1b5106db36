"""Vision architectures of transformers, with random weights, from small but structurally faithful configurations.

Each row of the tables, here and in `transformers_dense`, names a class, what differs from the defaults of its
configuration, and what the model takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from zoo.catalogue import Entry
from zoo.transformers_dense import DENSE, DETECTION, SEGMENTATION
from zoo.transformers_rows import (
    BEIT,
    CLIP,
    DINO,
    LARGE,
    LAST_STAGES,
    PYRAMID,
    RESNET,
    SMALL,
    STAGES,
    SWIN,
    TEXT,
    VIT,
    Row,
    colours,
    images,
    patches,
    rows_of_patches,
    videos,
)

CLASSIFICATION = (
    Row("vit", "ViTForImageClassification", VIT, SMALL),
    Row("vit-pooled", "ViTModel", VIT | {"pooler_output_size": 72}, SMALL),
    Row("vit-masked-image", "ViTForMaskedImageModeling", VIT, SMALL),
    Row("deit", "DeiTForImageClassification", VIT, SMALL),
    Row("deit-teacher", "DeiTForImageClassificationWithTeacher", VIT, SMALL),
    Row("beit", "BeitForImageClassification", BEIT, SMALL),
    Row(
        "beit-shared-bias",
        "BeitForImageClassification",
        BEIT | {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
        SMALL,
    ),
    Row("data2vec", "Data2VecVisionForImageClassification", BEIT, SMALL),
    Row("swin", "SwinForImageClassification", SWIN, SMALL),
    Row("swinv2", "Swinv2ForImageClassification", SWIN | {"pretrained_window_sizes": [0, 0, 0]}, SMALL),
    Row("dinov2", "Dinov2ForImageClassification", DINO, SMALL),
    Row("dinov2-swiglu", "Dinov2ForImageClassification", DINO | {"use_swiglu_ffn": True}, SMALL),
    Row("dinov2-registers", "Dinov2WithRegistersForImageClassification", DINO, SMALL),
    Row("convnext", "ConvNextForImageClassification", STAGES, SMALL),
    Row("convnextv2", "ConvNextV2ForImageClassification", STAGES, SMALL),
    Row("segformer", "SegformerForImageClassification", PYRAMID, SMALL),
    Row(
        "mobilevit",
        "MobileViTForImageClassification",
        {
            "hidden_sizes": [48, 64, 80],
            "neck_hidden_sizes": [8, 16, 24, 32, 40, 56, 96],
            "image_size": 64,
        },
        SMALL,
    ),
    Row(
        "mobilevitv2",
        "MobileViTV2ForImageClassification",
        {"image_size": 64, "n_attn_blocks": [1, 2, 1], "base_attn_unit_dims": [32, 48, 64], "width_multiplier": 0.5},
        SMALL,
    ),
    Row("mobilenet_v1", "MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}, SMALL),
    Row("mobilenet_v2", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.35}, SMALL),
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
        SMALL,
    ),
    Row(
        "levit-teacher",
        "LevitForImageClassificationWithTeacher",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 4, 6], "depths": [1, 1, 1]},
        SMALL,
    ),
    Row("pvt", "PvtForImageClassification", PYRAMID | {"image_size": 64}, SMALL),
    Row("pvt_v2", "PvtV2ForImageClassification", PYRAMID | {"image_size": [64, 64]}, SMALL),
    Row(
        "pvt_v2-linear",
        "PvtV2ForImageClassification",
        PYRAMID | {"image_size": [64, 64], "linear_attention": True},
        SMALL,
    ),
    Row("cvt", "CvtForImageClassification", {"embed_dim": [16, 48, 96], "depth": [1, 2, 3]}, SMALL),
    Row(
        "hiera",
        "HieraForImageClassification",
        {"embed_dim": 16, "image_size": [128, 128], "depths": [1, 2, 2, 1], "masked_unit_size": [8, 8]},
        LARGE,
    ),
    Row("poolformer", "PoolFormerForImageClassification", STAGES, SMALL),
    Row(
        "focalnet",
        "FocalNetForImageClassification",
        {"image_size": 64, "embed_dim": 16, "depths": [1, 2, 2, 1], "hidden_sizes": [32, 64, 128, 128]},
        SMALL,
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
        SMALL,
    ),
    Row(
        "efficientnet",
        "EfficientNetForImageClassification",
        {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 640},
        SMALL,
    ),
    Row("regnet-y", "RegNetForImageClassification", RESNET | {"groups_width": 16}, SMALL),
    Row("regnet-x", "RegNetForImageClassification", RESNET | {"groups_width": 16, "layer_type": "x"}, SMALL),
    Row("resnet", "ResNetForImageClassification", RESNET, SMALL),
    Row("resnet-basic", "ResNetForImageClassification", RESNET | {"layer_type": "basic"}, SMALL),
    Row("bit", "BitForImageClassification", RESNET | {"num_groups": 8}, SMALL),
    Row("bit-bottleneck", "BitForImageClassification", RESNET | {"num_groups": 8, "layer_type": "bottleneck"}, SMALL),
    Row("vit_msn", "ViTMSNForImageClassification", VIT, SMALL),
    Row("ijepa", "IJepaForImageClassification", VIT, SMALL),
    Row("clip", "CLIPForImageClassification", CLIP, SMALL),
    Row("metaclip_2", "MetaClip2ForImageClassification", CLIP, SMALL),
    Row("siglip", "SiglipForImageClassification", {"vision_config": VIT, "text_config": TEXT}, SMALL),
    Row(
        "siglip2",
        "Siglip2ForImageClassification",
        {"vision_config": {k: v for k, v in VIT.items() if k != "image_size"} | {"num_patches": 16}},
        partial(patches, 4, 4, 768),
    ),
    Row(
        "textnet",
        "TextNetForImageClassification",
        {"stem_out_channels": 16, "hidden_sizes": [16, 24, 32, 48, 64]},
        SMALL,
    ),
    Row("timm_wrapper", "TimmWrapperForImageClassification", {"architecture": "resnet18"}, SMALL),
    Row(
        "swiftformer",
        "SwiftFormerForImageClassification",
        {"depths": [1, 2, 2, 1], "embed_dims": [16, 24, 48, 96], "image_size": 64},
        SMALL,
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
        SMALL,
    ),
    Row("pp_lcnet", "PPLCNetForImageClassification", {"scale": 0.5, "class_expand": 96}, SMALL),
)

BACKBONES = (
    Row(
        "vit_mae",
        "ViTMAEForPreTraining",
        VIT
        | {
            "decoder_hidden_size": 64,
            "decoder_num_attention_heads": 4,
            "decoder_num_hidden_layers": 2,
            "decoder_intermediate_size": 80,
        },
        SMALL,
    ),
    Row("swin-backbone", "SwinBackbone", SWIN | {"out_features": ["stage1", "stage3"]}, SMALL),
    Row("maskformer_swin-backbone", "MaskFormerSwinBackbone", SWIN | {"out_features": ["stage1", "stage3"]}, SMALL),
    Row(
        "swin2sr",
        "Swin2SRForImageSuperResolution",
        {"image_size": 32, "embed_dim": 24, "depths": [2, 2], "num_heads": [4, 4], "window_size": 4},
        partial(images, 32),
    ),
    Row("dinov3_vit", "DINOv3ViTModel", VIT | {"num_register_tokens": 4}, SMALL),
    Row("dinov3_vit-gated", "DINOv3ViTModel", VIT | {"num_register_tokens": 4, "use_gated_mlp": True}, SMALL),
    Row("dinov3_convnext", "DINOv3ConvNextModel", STAGES, SMALL),
    Row(
        "vitdet",
        "VitDetBackbone",
        DINO
        | {
            "pretrain_image_size": 64,
            "window_block_indices": [0],
            "residual_block_indices": [1],
            "use_relative_position_embeddings": True,
            "window_size": 3,
        },
        SMALL,
    ),
    Row("clip-vision", "CLIPVisionModelWithProjection", VIT | {"projection_dim": 72}, SMALL),
    Row("chinese_clip-vision", "ChineseCLIPVisionModel", VIT, SMALL),
    Row("altclip-vision", "AltCLIPVisionModel", VIT, SMALL),
    Row("siglip-vision", "SiglipVisionModel", VIT, SMALL),
    Row("blip-vision", "BlipVisionModel", VIT, SMALL),
    Row("git-vision", "GitVisionModel", VIT, SMALL),
    Row("flava-image", "FlavaImageModel", VIT, SMALL),
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
        SMALL,
    ),
    Row("owlvit-vision", "OwlViTVisionModel", VIT, SMALL),
    Row("mlcd-vision", "MLCDVisionModel", VIT, SMALL),
    Row("aimv2-vision", "Aimv2VisionModel", VIT, SMALL),
    Row("pixtral-vision", "PixtralVisionModel", VIT | {"head_dim": 24}, SMALL),
    Row(
        "internvl-vision",
        "InternVLVisionModel",
        VIT | {"image_size": [64, 64], "patch_size": [16, 16], "use_qk_norm": True, "norm_type": "rms_norm"},
        SMALL,
    ),
    Row("radio", "RadioModel", DINO | {"mlp_ratio": 2.0, "max_img_size": 64, "num_registers": 3}, SMALL),
    Row("pixio", "PixioModel", DINO, SMALL),
    Row("tipsv2-vision", "Tipsv2VisionModel", DINO, SMALL),
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
        VIT | {"image_size": 32, "num_frames": 4},
        partial(videos, "pixel_values", 4, 32),
    ),
    Row(
        "vivit",
        "VivitForVideoClassification",
        {k: v for k, v in VIT.items() if k != "patch_size"} | {"image_size": 32, "num_frames": 4},
        partial(videos, "pixel_values", 4, 32),
    ),
    Row(
        "timesformer",
        "TimesformerForVideoClassification",
        VIT | {"image_size": 32, "num_frames": 4},
        partial(videos, "pixel_values", 4, 32),
    ),
    Row(
        "qwen2_vl-vision",
        "models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        {"depth": 2, "embed_dim": 96, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 112},
        partial(rows_of_patches, 2, 4, 4, 1176),
    ),
    Row("rt_detr_resnet", "RTDetrResNetBackbone", RESNET | LAST_STAGES, SMALL),
    Row("pp_lcnet_v3", "PPLCNetV3Backbone", {"scale": 0.5}, SMALL),
    Row(
        "superpoint",
        "SuperPointForKeypointDetection",
        {"encoder_hidden_sizes": [16, 24, 32, 40], "decoder_hidden_size": 48, "descriptor_decoder_dim": 56},
        SMALL,
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
