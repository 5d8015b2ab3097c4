"""Tiny random models for the segmenters, of the real classes: the profile fields that name them, by segmenter."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import make_dino

WORDS = ("cat", "dog", "sofa", "and", "a", ".")


def make_segmenter_models(folder: Path, seed: int = 0) -> Path:
    """Write ``folder/dino``, ``folder/sam``, ``folder/grounding`` and ``folder/detector``; return ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make_dino().save_pretrained(folder / "dino")
        make_sam(folder / "sam")
        make_grounding(folder / "grounding")
        make_detector(folder / "detector")
    return folder


def segmenter_overrides(folder: Path, name: str) -> dict:
    """Overrides of the mini profile under which the segmenter ``name`` runs with the models in ``folder``, fast and with few filters."""
    fields = {
        # Features of random weights: later cuts are a tie, which rounding decides.
        "maskcut": {"models.dino": "dino", "masks.maskcut_size": 64, "masks.maskcut_rounds": 1},
        "detector": {"models.detector": "detector", "masks.detector_score": 0.0},
        "sam": {"models.sam": "sam", "masks.sam_points": 3, "masks.sam_iou": 0.0, "masks.sam_stability": 0.0},
        "grounded-sam": {"models.sam": "sam", "models.grounding": "grounding", "masks.grounding_box": 0.0, "masks.grounding_text": 0.0},
    }.get(name, {})
    paths = {key: str(folder / value) for key, value in fields.items() if key.startswith("models.")}
    return {"masks.segmenter": name, **fields, **paths}


def make_sam(folder: Path) -> None:
    """A SamModel of 64 px and patches of 8, with its processor."""
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    config = SamConfig(
        vision_config={"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
                       "patch_size": 8, "mlp_dim": 32, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8},
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                             "iou_head_depth": 2, "iou_head_hidden_dim": 16, "attention_downsample_rate": 2})
    model = SamModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6)
            if name.startswith("mask_decoder.iou_prediction_head.proj_out.bias"):
                parameter.fill_(0.5)  # scores spread about one half, so that the filter has something to do
            if "output_hypernetworks_mlps" in name and "proj_out" in name:
                parameter.mul_(1500)  # logits of some units, so that stability differs between masks
    model.save_pretrained(folder)
    processor = SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 16},
                                  mask_pad_size={"height": 16, "width": 16})
    SamProcessor(processor).save_pretrained(folder)


def make_grounding(folder: Path) -> None:
    """A GroundingDinoForObjectDetection with a small Swin and a small BERT, with its processor."""
    import transformers

    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", *WORDS)
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=32)
    swin = transformers.SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, image_size=64, patch_size=4,
                                   out_features=["stage2", "stage3", "stage4"])
    bert = transformers.BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                   intermediate_size=32, max_position_embeddings=64)
    config = transformers.GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=6, max_text_len=32, encoder_n_points=2,
        decoder_n_points=2)
    transformers.GroundingDinoForObjectDetection(config).eval().save_pretrained(folder)
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 72, "longest_edge": 144})
    transformers.GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)


def make_detector(folder: Path) -> None:
    """The package's own Mask R-CNN, narrower."""
    from ovdiff_lib.masks.segmenters.detector import CONFIG, build_detector, save_detector

    config = {**CONFIG, "widths": [8, 8, 16, 16], "pyramid": 16, "box_head": 16, "mask_head": [16], "short_side": 64, "detections": 5}
    save_detector(build_detector(config), config, folder)
