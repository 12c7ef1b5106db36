"""Architectures of transformers that detect, segment, estimate depth or poses, or matte: see `transformers_models`."""

from __future__ import annotations

from functools import partial

import torch

from zoo.transformers_rows import (
    ALL_STAGES,
    BEIT,
    BEIT_SEGMENTER,
    DETR,
    DINO,
    DINO_BACKBONE,
    FOUR_LAYERS,
    LARGE,
    LAST_STAGES,
    MASKED,
    NECK,
    PYRAMID,
    RESNET_BACKBONE,
    RT_DETR,
    SAM,
    SAM2_BACKBONE,
    SAM_VISION,
    SMALL,
    STAGES,
    TEXT,
    VIT,
    Row,
    images,
    prompted,
    with_depth,
    with_example,
    with_experts,
    with_task,
    with_text,
)

DETECTION = (
    Row("detr", "DetrForObjectDetection", DETR, LARGE),
    Row(
        "detr-segmentation",
        "DetrForSegmentation",
        DETR
        | {
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "backbone_config": RESNET_BACKBONE | ALL_STAGES,
        },
        LARGE,
    ),
    Row("conditional_detr", "ConditionalDetrForObjectDetection", DETR, LARGE),
    Row("table_transformer", "TableTransformerForObjectDetection", DETR, LARGE),
    Row(
        "dab_detr",
        "DabDetrForObjectDetection",
        {k: v for k, v in DETR.items() if k != "d_model"} | {"hidden_size": 64},
        LARGE,
    ),
    Row(
        "deformable_detr",
        "DeformableDetrForObjectDetection",
        DETR | {"backbone_config": RESNET_BACKBONE | LAST_STAGES, "disable_custom_kernels": True},
        LARGE,
    ),
    Row(
        "deformable_detr-two-stage",
        "DeformableDetrForObjectDetection",
        DETR
        | {
            "backbone_config": RESNET_BACKBONE | LAST_STAGES,
            "disable_custom_kernels": True,
            "two_stage": True,
            "with_box_refine": True,
            "two_stage_num_proposals": 10,
        },
        LARGE,
    ),
    Row("rt_detr", "RTDetrForObjectDetection", RT_DETR, LARGE),
    Row("rt_detr_v2", "RTDetrV2ForObjectDetection", RT_DETR, LARGE),
    Row("d_fine", "DFineForObjectDetection", RT_DETR | {"d_model": 48, "lqe_hidden_dim": 24}, LARGE),
    Row(
        "lw_detr",
        "LwDetrForObjectDetection",
        {
            "backbone_config": {
                "model_type": "lw_detr_vit",
                **DINO,
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
        SMALL,
    ),
    Row("yolos", "YolosForObjectDetection", VIT | {"image_size": [64, 64], "num_detection_tokens": 10}, SMALL),
    Row(
        "owlvit",
        "OwlViTForObjectDetection",
        {"vision_config": VIT, "text_config": TEXT | {"hidden_size": 80}, "projection_dim": 80},
        partial(with_text, 64, 8, 90),
    ),
)

SEGMENTATION = (
    Row("beit-segmentation", "BeitForSemanticSegmentation", BEIT_SEGMENTER, SMALL),
    Row("data2vec-segmentation", "Data2VecVisionForSemanticSegmentation", BEIT_SEGMENTER, SMALL),
    Row("segformer-segmentation", "SegformerForSemanticSegmentation", PYRAMID | {"decoder_hidden_size": 48}, SMALL),
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
        LARGE,
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
        LARGE,
    ),
    Row(
        "mobilenet_v2-segmentation",
        "MobileNetV2ForSemanticSegmentation",
        {"depth_multiplier": 0.35, "output_stride": 16},
        LARGE,
    ),
    Row(
        "mask2former",
        "Mask2FormerForUniversalSegmentation",
        MASKED | {"feature_size": 64, "mask_feature_size": 64},
        LARGE,
    ),
    Row(
        "maskformer",
        "MaskFormerForInstanceSegmentation",
        {
            "backbone_config": MASKED["backbone_config"],
            "decoder_config": {"model_type": "detr", **{k: v for k, v in DETR.items() if k != "backbone_config"}},
            "fpn_feature_size": 64,
            "mask_feature_size": 56,
        },
        LARGE,
    ),
    Row(
        "oneformer",
        "OneFormerForUniversalSegmentation",
        MASKED | {"conv_dim": 64, "mask_dim": 64, "text_encoder_width": 64},
        partial(with_task, 128, 77),
    ),
    Row("eomt", "EomtForUniversalSegmentation", DINO | FOUR_LAYERS | {"num_blocks": 2, "num_queries": 10}, SMALL),
    Row(
        "eomt_dinov3",
        "EomtDinov3ForUniversalSegmentation",
        VIT | FOUR_LAYERS | {"num_blocks": 2, "num_queries": 10},
        SMALL,
    ),
    Row(
        "upernet",
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": {"model_type": "convnext", **STAGES, **ALL_STAGES},
            "hidden_size": 48,
            "auxiliary_channels": 40,
            "auxiliary_in_channels": 72,
        },
        LARGE,
    ),
    Row("sam-vision", "SamVisionModel", SAM_VISION, SMALL),
    Row("sam", "SamModel", SAM, partial(prompted, 64)),
    Row("sam_hq-vision", "SamHQVisionModel", SAM_VISION, SMALL),
    Row(
        "sam2-vision",
        "Sam2VisionModel",
        {
            "backbone_config": SAM2_BACKBONE,
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "fpn_hidden_size": 48,
        },
        LARGE,
    ),
    Row(
        "sam3-vit",
        "Sam3ViTModel",
        VIT | {"pretrain_image_size": 32, "window_size": 2, "global_attn_indexes": [1]},
        SMALL,
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
        VIT
        | {
            "num_key_value_heads_per_layer": [4, 2],
            "num_register_tokens": 2,
            "head_config": {"upsample_out_channels": [48, 40], "conv_out_channels": [32]},
        },
        SMALL,
    ),
)

DENSE = (
    Row("dpt", "DPTForDepthEstimation", VIT | FOUR_LAYERS | NECK | {"backbone_out_indices": [0, 1, 2, 3]}, SMALL),
    Row(
        "dpt-segmentation",
        "DPTForSemanticSegmentation",
        VIT | FOUR_LAYERS | NECK | {"backbone_out_indices": [0, 1, 2, 3]},
        SMALL,
    ),
    Row(
        "depth_anything",
        "DepthAnythingForDepthEstimation",
        NECK
        | {"backbone_config": DINO_BACKBONE, "patch_size": 16, "reassemble_hidden_size": 96, "head_hidden_size": 24},
        SMALL,
    ),
    Row(
        "prompt_depth_anything",
        "PromptDepthAnythingForDepthEstimation",
        NECK
        | {"backbone_config": DINO_BACKBONE, "patch_size": 16, "reassemble_hidden_size": 96, "head_hidden_size": 24},
        partial(with_depth, 64, 16),
    ),
    Row("glpn", "GLPNForDepthEstimation", PYRAMID | {"decoder_hidden_size": 24}, SMALL),
    Row(
        "zoedepth",
        "ZoeDepthForDepthEstimation",
        NECK
        | {
            "backbone_config": {
                "model_type": "beit",
                **BEIT,
                **FOUR_LAYERS,
                **ALL_STAGES,
                "reshape_hidden_states": False,
            },
            "bottleneck_features": 32,
            "num_relative_features": 16,
            "bin_embedding_dim": 24,
        },
        SMALL,
    ),
    Row(
        "vitpose",
        "VitPoseForPoseEstimation",
        {
            "backbone_config": {
                "model_type": "vitpose_backbone",
                **DINO,
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
                **DINO,
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
                **DINO,
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
                **DINO,
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
        LARGE,
    ),
)
