"""A checkpoint's scheduler_config.json as diffusers' StableDiffusionPipeline leaves it. Knows nothing of samplers.

Stable Diffusion was trained with timesteps that begin at 1 and with latents that nobody clips, and early checkpoints
were published with files that say otherwise, or nothing. diffusers' pipeline therefore corrects two options as it
loads, whatever class the file names and whatever the default of that class is (StableDiffusionPipeline.__init__):
`steps_offset` becomes 1, and `clip_sample` becomes false. It holds for Stable Diffusion 1.x and 2.x alone: SDXL's
pipeline corrects neither.
"""

from collections.abc import Mapping
from typing import Any


def corrected(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The file's content with these options corrected, and a sentence for each correction.

    An impossible value stays, and Schedule.from_config refuses it.
    """
    changed = dict(config)
    remarks = []
    offset = config.get("steps_offset", 0)
    if type(offset) is int and offset >= 0 and offset != 1:
        changed["steps_offset"] = 1
        remarks.append(
            f"steps_offset is 1 instead of {stated(config, 'steps_offset', offset)}, as diffusers' pipeline has it."
        )
    if config.get("clip_sample") is True:
        changed["clip_sample"] = False
        remarks.append("clip_sample is false instead of true, as diffusers' pipeline has it.")
    # diffusers' inpainting pipeline corrects this one too. Its text-to-image pipeline does not: it would evaluate the
    # UNet twelve times for the first three steps, which is worse for latents (CompVis/latent-diffusion pull 51).
    skips = config.get("skip_prk_steps", False)
    if config.get("_class_name") == "PNDMScheduler" and skips is False:
        changed["skip_prk_steps"] = True
        before = stated(config, "skip_prk_steps", skips)
        remarks.append(f"skip_prk_steps is true instead of {before}: the Runge-Kutta start is not run.")
    return changed, remarks


def stated(config: Mapping[str, Any], name: str, default: Any) -> str:
    """The value in a file that is corrected, as a remark states it."""
    return str(default).lower() + ("" if name in config else ", its default")
