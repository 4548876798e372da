"""Models of Hugging Face for images, sound, series of numbers, and several kinds of input at once."""

from __future__ import annotations

from typing import Any

import torch

from families.hugging_face import BART, ENCODER_DECODER, SIZES, SPECIAL, WORDS, entry, pixels, text

_VIT = {
    key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
_PATCHES = {**_VIT, "image_size": 32, "patch_size": 8}
_STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32]}
_WAVE = {
    **_VIT,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
}
_SERIES = {
    "prediction_length": 4,
    "context_length": 12,
    "lags_sequence": [1, 2],
    "num_time_features": 2,
    **ENCODER_DECODER,
}
# series in patches
_PATCHED_SERIES = {
    "num_input_channels": 3,
    "context_length": 32,
    "patch_length": 4,
    "patch_stride": 4,
    "prediction_length": 8,
}
_IMAGES = pixels()
_TEXT = {**SIZES, **SPECIAL}


def _waves() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 800)}


def _spectra() -> dict[str, Any]:
    return {
        "input_features": torch.randn(1, 16, 32),
        "decoder_input_ids": torch.randint(5, WORDS, (1, 6)),
        "use_cache": False,
    }


def _past_and_future() -> dict[str, Any]:
    return {
        "past_values": torch.randn(2, 14),
        "past_time_features": torch.randn(2, 14, 2),
        "past_observed_mask": torch.ones(2, 14),
        "future_values": torch.randn(2, 4),
        "future_time_features": torch.randn(2, 4, 2),
        "use_cache": False,
    }


def _images_and_texts() -> dict[str, Any]:
    return {**text()(), **_IMAGES()}


ENTRIES = {
    # images
    "ViTForImageClassification": entry("ViTForImageClassification", _IMAGES, _PATCHES),
    "DeiTForImageClassification": entry("DeiTForImageClassification", _IMAGES, _PATCHES),
    "BeitForImageClassification": entry(
        "BeitForImageClassification", _IMAGES, _PATCHES, use_relative_position_bias=True
    ),
    "Dinov2ForImageClassification": entry("Dinov2ForImageClassification", _IMAGES, _PATCHES),
    "Dinov2ForImageClassification without mask_token": entry(
        "Dinov2ForImageClassification", _IMAGES, _PATCHES, use_mask_token=False
    ),
    "SwinForImageClassification": entry(
        "SwinForImageClassification",
        _IMAGES,
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "Swinv2ForImageClassification": entry(
        "Swinv2ForImageClassification",
        _IMAGES,
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "ConvNextForImageClassification": entry("ConvNextForImageClassification", _IMAGES, _STAGES, num_stages=2),
    "ConvNextV2ForImageClassification": entry(
        "ConvNextV2ForImageClassification", _IMAGES, _STAGES, num_stages=2
    ),
    "ResNetForImageClassification": entry("ResNetForImageClassification", _IMAGES, _STAGES, embedding_size=16),
    "RegNetForImageClassification": entry(
        "RegNetForImageClassification", _IMAGES, _STAGES, embedding_size=16, groups_width=8
    ),
    "MobileNetV2ForImageClassification": entry(
        "MobileNetV2ForImageClassification", _IMAGES, depth_multiplier=0.35
    ),
    "EfficientNetForImageClassification": entry(
        "EfficientNetForImageClassification", _IMAGES, width_coefficient=0.5, hidden_dim=640
    ),
    "MobileViTForImageClassification": entry(
        "MobileViTForImageClassification",
        _IMAGES,
        image_size=32,
        hidden_sizes=[32, 40, 48],
        neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64],
    ),
    "SegformerForSemanticSegmentation": entry(
        "SegformerForSemanticSegmentation",
        _IMAGES,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    "PvtForImageClassification": entry(
        "PvtForImageClassification",
        pixels(64),
        image_size=64,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 2, 4, 4],
    ),
    "CvtForImageClassification": entry(
        "CvtForImageClassification",
        _IMAGES,
        embed_dim=[16, 32, 64],
        num_heads=[1, 2, 4],
        depth=[1, 2, 3],
        cls_token=[False, False, True],
    ),
    "LevitForImageClassification": entry(
        "LevitForImageClassification",
        pixels(64),
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "PoolFormerForImageClassification": entry(
        "PoolFormerForImageClassification", _IMAGES, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1]
    ),
    "DPTForDepthEstimation": entry(
        "DPTForDepthEstimation",
        _IMAGES,
        _PATCHES,
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16,
        reassemble_factors=[4, 2, 1, 0.5],
    ),
    "GLPNForDepthEstimation": entry(
        "GLPNForDepthEstimation",
        _IMAGES,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
    ),
    "YolosForObjectDetection": entry(
        "YolosForObjectDetection", _IMAGES, _VIT, image_size=[32, 32], patch_size=8, num_detection_tokens=5
    ),
    "DetrForObjectDetection": entry(
        "DetrForObjectDetection",
        _IMAGES,
        {key: value for key, value in BART.items() if key not in ("vocab_size", "max_position_embeddings")},
        num_queries=5,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 16,
            "hidden_sizes": [16, 32, 32, 32],
            "depths": [1, 1, 1, 1],
            "out_features": ["stage4"],
        },
    ),
    "VideoMAEForVideoClassification": entry(
        "VideoMAEForVideoClassification",
        lambda: {"pixel_values": torch.randn(1, 4, 3, 32, 32)},
        _PATCHES,
        num_frames=4,
    ),
    # sound
    "Wav2Vec2ForCTC": entry("Wav2Vec2ForCTC", _waves, _WAVE),
    "HubertForSequenceClassification": entry("HubertForSequenceClassification", _waves, _WAVE),
    "WavLMForSequenceClassification": entry("WavLMForSequenceClassification", _waves, _WAVE),
    "SEWForCTC": entry("SEWForCTC", _waves, _WAVE, squeeze_factor=2),
    "WhisperForConditionalGeneration": entry(
        "WhisperForConditionalGeneration",
        _spectra,
        BART,
        SPECIAL,
        decoder_start_token_id=1,
        num_mel_bins=16,
        max_source_positions=16,
        max_target_positions=32,
    ),
    "Speech2TextForConditionalGeneration": entry(
        "Speech2TextForConditionalGeneration",
        lambda: {**_spectra(), "input_features": torch.randn(1, 32, 16)},
        BART,
        SPECIAL,
        decoder_start_token_id=1,
        input_feat_per_channel=16,
        conv_channels=32,
        max_source_positions=64,
        max_target_positions=32,
    ),
    "ASTForAudioClassification": entry(
        "ASTForAudioClassification",
        lambda: {"input_values": torch.randn(1, 32, 16)},
        _VIT,
        max_length=32,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
    ),
    # series of numbers
    "PatchTSTForPrediction": entry(
        "PatchTSTForPrediction",
        lambda: {"past_values": torch.randn(2, 32, 3)},
        _PATCHED_SERIES,
        d_model=32,
        ffn_dim=48,
        num_attention_heads=4,
        num_hidden_layers=2,
    ),
    "PatchTSMixerForPrediction": entry(
        "PatchTSMixerForPrediction",
        lambda: {"past_values": torch.randn(2, 32, 3)},
        _PATCHED_SERIES,
        d_model=16,
        num_layers=2,
    ),
    "TimeSeriesTransformerForPrediction": entry(
        "TimeSeriesTransformerForPrediction", _past_and_future, _SERIES
    ),
    "InformerForPrediction": entry("InformerForPrediction", _past_and_future, _SERIES),
    "AutoformerForPrediction": entry(
        "AutoformerForPrediction", _past_and_future, _SERIES, moving_average=5, label_length=4
    ),
    # several kinds of input
    "CLIPModel": entry(
        "CLIPModel",
        _images_and_texts,
        text_config={**_TEXT, "eos_token_id": 63},
        vision_config=dict(_PATCHES),
        projection_dim=16,
    ),
    "SiglipModel": entry(
        "SiglipModel",
        _images_and_texts,
        text_config={**_TEXT, "projection_size": 32},
        vision_config=dict(_PATCHES),
    ),
    "ViltForQuestionAnswering": entry(
        "ViltForQuestionAnswering",
        lambda: {**text()(), **_IMAGES(), "pixel_mask": torch.ones(2, 32, 32, dtype=torch.long)},
        SIZES,
        image_size=32,
        patch_size=8,
        num_labels=4,
    ),
    "BlipForQuestionAnswering": entry(
        "BlipForQuestionAnswering",
        lambda: {**_images_and_texts(), "decoder_input_ids": torch.randint(5, WORDS, (2, 4))},
        text_config={**_TEXT, "encoder_hidden_size": 32, "sep_token_id": 2},
        vision_config=dict(_PATCHES),
    ),
    "LayoutLMForTokenClassification": entry(
        "LayoutLMForTokenClassification",
        lambda: {**text()(), "bbox": torch.randint(0, 32, (2, 10, 2)).repeat(1, 1, 2)},
        SIZES,
        max_2d_position_embeddings=128,
    ),
}
