"""Segment Anything (Kirillov et al., 2023) as segmenter, by a grid of points or by Grounding DINO's boxes (App. A.1).

A grid of points asks for everything in the image, boxes for what it was drawn for. The networks are transformers'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ovdiff_lib.errors import InputError
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.networks.loading import load_transformers
from ovdiff_lib.profiles.schema import Masks, Profile

if TYPE_CHECKING:
    from transformers import SamModel, SamProcessor

POINTS_AT_ONCE = 64
BOX_NMS = 0.7
"""Of two masks whose boxes overlap with a higher IoU the one of lower predicted IoU is dropped."""


class SegmentAnything:
    """Three masks of each of ``sam_points`` x ``sam_points`` prompts that pass ``sam_iou`` and ``sam_stability``."""

    name = "sam"

    def __init__(self, model: SamModel, processor: SamProcessor, settings: Masks) -> None:
        from transformers import MaskGenerationPipeline

        self.settings, reader = settings, processor.image_processor
        self.generate = MaskGenerationPipeline(model=model, image_processor=reader, device=model.device)

    @classmethod
    def build(cls, profile: Profile) -> SegmentAnything:
        """The segmenter of a profile. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        return cls(*load_sam(profile), profile.masks)

    @undisturbed()
    def propose(self, image: np.ndarray, words: str) -> np.ndarray:
        """bool (M, H, W) of an image u8 (H, W, 3), highest predicted IoU first, none empty. ``words`` are not read."""
        _check_elongation(image, self.generate.image_processor)
        found = self.generate(
            Image.fromarray(image), points_per_crop=self.settings.sam_points, points_per_batch=POINTS_AT_ONCE,
            pred_iou_thresh=self.settings.sam_iou, stability_score_thresh=self.settings.sam_stability,
            crops_nms_thresh=BOX_NMS)
        masks = np.array([mask.numpy() for mask in found["masks"]], dtype=bool).reshape(-1, *image.shape[:2])
        return masks[masks.any(axis=(1, 2))]


class GroundedSam:
    """Boxes of Grounding DINO (Liu et al., 2023) for the words, each turned into one mask by Segment Anything.

    A box counts if one of its words scores above ``grounding_box``, and one above ``grounding_text``.
    """

    name = "grounded-sam"

    def __init__(self, grounding: tuple, model: SamModel, processor: SamProcessor, settings: Masks) -> None:
        """``grounding`` is a ``GroundingDinoForObjectDetection`` and its processor."""
        self.detector, self.read = grounding
        self.model, self.processor, self.settings = model, processor, settings

    @classmethod
    def build(cls, profile: Profile) -> GroundedSam:
        """The segmenter of a profile. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        kinds = ("GroundingDinoForObjectDetection", "GroundingDinoProcessor")
        return cls(load_transformers(profile, "grounding", *kinds), *load_sam(profile), profile.masks)

    @undisturbed()
    def propose(self, image: np.ndarray, words: str) -> np.ndarray:
        """bool (M, H, W) of an image u8 (H, W, 3), highest score first, none empty. ``InputError`` without words."""
        _check_elongation(image, self.processor.image_processor)
        boxes = self.boxes(image, words)
        if not len(boxes):
            return np.zeros((0, *image.shape[:2]), dtype=bool)
        inputs = self.processor(Image.fromarray(image), input_boxes=[boxes.tolist()], return_tensors="pt")
        given = {name: inputs[name].to(self.model.device, self.model.dtype) for name in ("pixel_values", "input_boxes")}
        output = self.model(**given, multimask_output=False)
        masks = self.processor.image_processor.post_process_masks(
            output.pred_masks.float().cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"])[0][:, 0].numpy()
        return masks[masks.any(axis=(1, 2))]

    @undisturbed()
    def boxes(self, image: np.ndarray, words: str) -> np.ndarray:
        """Boxes f32 (M, 4) as (x0, y0, x1, y1) in pixels of ``image`` u8 (H, W, 3), highest score first."""
        # Grounding DINO was trained on lower-case phrases that end in a full stop.
        text = " ".join(words.lower().split()).rstrip(" .")
        if not text:
            raise InputError("The segmenter 'grounded-sam' looks for what an image was drawn for, but no words were "
                             "given; give some.")
        inputs = self.read(images=Image.fromarray(image), text=text + ".", return_tensors="pt", truncation=True,
                           max_length=self.detector.config.max_text_len).to(self.detector.device, self.detector.dtype)
        found = self.read.post_process_grounded_object_detection(
            self.detector(**inputs), inputs["input_ids"], self.settings.grounding_box, self.settings.grounding_text,
            target_sizes=[image.shape[:2]])[0]
        scores, boxes = found["scores"].float().cpu().numpy(), found["boxes"].float().cpu().numpy().reshape(-1, 4)
        order = [i for i in np.argsort(-scores, kind="stable") if found["text_labels"][i].strip()]
        return boxes[order]


def load_sam(profile: Profile) -> tuple[SamModel, SamProcessor]:
    """The network and the processor of ``models.sam``, which both segmenters share."""
    # Whatever models.dtype says: the suppression of overlapping boxes refuses scores in half precision.
    return load_transformers(profile, "sam", "SamModel", "SamProcessor", dtype=torch.float32)


def _check_elongation(image: np.ndarray, image_processor) -> None:
    long = image_processor.size["longest_edge"]
    if 2 * long * min(image.shape[:2]) < max(image.shape[:2]):
        raise InputError(f"The image of {image.shape[0]} x {image.shape[1]} pixels is too elongated for Segment "
                         f"Anything, which sees {long} pixels of the long side; use one that is less so.")
