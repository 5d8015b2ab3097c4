"""Stable Diffusion v1.5 as its files are published, for the tests at real sizes."""

import json

from diffusers import PNDMScheduler

SD_SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None}
"""The published file. It names no timestep spacing, so another scheduler made from it has its own; one that diffusers wrote does."""

NARROW = {
    "unet": {"block_out_channels": (16, 32, 64, 64), "cross_attention_dim": 32, "norm_num_groups": 8},
    "vae": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 8},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}}
"""Makes the networks thin and keeps their layout: the same blocks, layers, heads and names."""


def save_pipeline(pipe, folder) -> None:
    """Write the pipeline with the scheduler's file as it is published."""
    pipe.register_modules(scheduler=PNDMScheduler.from_config(SD_SCHEDULER))
    pipe.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD_SCHEDULER))
