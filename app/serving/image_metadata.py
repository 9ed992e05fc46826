"""Finished images as files: encoded, with the facts that make each image again as text in a PNG.

The replica and the batch worker write the same files. Knows nothing of Ray, HTTP or disks.
"""

import numpy as np

from app.api.messages import fact_text
from app.api.settings import Encoding
from app.diffusion.images import encode
from app.engine.request import Generated
from app.types import Generation

PREVIEW_PNG_LEVEL = 1  # a preview is looked at once

Facts = dict[str, str | int | float | bool]


def facts_of(generation: Generation, generated: Generated) -> Facts:
    """What a client needs in order to make the same image again, and whether all of its prompt was read."""
    return {
        "seed": generation.seed,
        "sampler": generated.sampler,
        "num_inference_steps": generation.num_inference_steps,
        "guidance_scale": generation.guidance_scale,
        "size": f"{generation.width}x{generation.height}",
        "prompt_truncated": generated.prompt_truncated,
        "negative_prompt_truncated": generated.negative_prompt_truncated,
        **{name: f"{height},{width}" for name, (height, width) in generation.fields},
        **({"strength": edit.strength} if (edit := generation.edit) and edit.strength is not None else {}),
    }


def timings_of(generated: Generated, encode_s: float) -> dict[str, float]:
    return {
        "queue_s": generated.queue_s,
        "denoise_s": generated.denoise_s,
        "decode_s": generated.decode_s,
        "encode_s": encode_s,
        "device_s": generated.device_s,
    }


def encode_image(generation: Generation, generated: Generated, index: int, encoding: Encoding, model: str) -> bytes:
    """The file of one image. A PNG says what made it, with the seed that makes this very image alone."""
    facts = {**facts_of(generation, generated), "seed": generated.seeds[index]}
    text = {
        "prompt": generation.prompt,
        "negative_prompt": generation.negative_prompt,
        "model": model,
        "Software": "imagine-tpu",
        **{name: fact_text(fact) for name, fact in facts.items()},
    }
    return encode_pixels(generated.pixels[index], encoding, encoding.png_level, text)


def encode_preview(pixels: np.ndarray, encoding: Encoding) -> bytes:
    return encode_pixels(pixels, encoding, PREVIEW_PNG_LEVEL, {})


def encode_pixels(pixels: np.ndarray, encoding: Encoding, png_level: int, text: dict[str, str]) -> bytes:
    return encode(pixels, encoding.output_format, quality=encoding.quality, png_level=png_level, text=text)
