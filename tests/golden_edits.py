"""What make_golden.py makes of pictures that begin from others: whole runs of diffusers' pipelines, with our noise."""

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from diffusers.models.autoencoders import vae
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from tests import edit_cases, tiny, tiny_flow
from tests.edit_cases import EditRun

Arrays = dict[str, np.ndarray[Any, Any]]

PIPELINES = {
    "tiny-sd1": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "tiny-sdxl": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "tiny-klein": ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinInpaintPipeline"),
    "tiny-z-image": ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
}


def edits(model: str, scheduler_for: Callable[[str, dict[str, Any]], Any]) -> Arrays:
    answers = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if model in tiny_flow.MODELS:
            tiny_flow.write_checkpoint(Path(folder), model, tiny_flow.tensor_tables()[model])
        else:
            tiny.write_checkpoint(Path(folder), model, tiny.tensor_shapes()[model])
        loaded, *editors = (getattr(diffusers, name) for name in PIPELINES[model])
        components = loaded.from_pretrained(folder).components
        known = dict(components["scheduler"].config)
        for run in edit_cases.RUNS[model]:
            scheduler = components["scheduler"] if run.sampler is None else scheduler_for(run.sampler, known)
            editor = loaded if run.strength is None else editors[run.masked]
            pipe = editor(**components | {"scheduler": scheduler})
            pipe.set_progress_bar_config(disable=True)
            pixels = drawn_by_klein(pipe, run) if model == "tiny-klein" else drawn(pipe, model, run)
            answers[str(run)] = (pixels * 255).round().astype(np.uint8)
    return answers


def inpainting(model: str, scheduler_for: Callable[[str, dict[str, Any]], Any]) -> Arrays:
    """Of a UNet that fills masks."""
    answers, prefix = {}, "StableDiffusionXL" if model == "tiny-sdxl" else "StableDiffusion"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tiny.write_inpainting_checkpoint(Path(folder), model, tiny.tensor_shapes()[model])
        loaded = getattr(diffusers, f"{prefix}Pipeline").from_pretrained(folder)
        pipe = getattr(diffusers, f"{prefix}InpaintPipeline")(**loaded.components)
        pipe.set_progress_bar_config(disable=True)
        known = dict(pipe.scheduler.config)
        for run in edit_cases.INPAINTING[model]:
            pipe.scheduler = scheduler_for(str(run.sampler), known)
            answers[str(run)] = (drawn(pipe, model, run, fills_masks=True) * 255).round().astype(np.uint8)
    return answers


def drawn(pipe: Any, model: str, run: EditRun, *, fills_masks: bool = False) -> Any:
    height, width = edit_cases.SIZES[model]
    initial, outside, posterior = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in edit_cases.noises(model))
    options: dict[str, Any] = {"height": height, "width": width} if run.masked or model in tiny_flow.MODELS else {}
    if model in tiny_flow.MODELS:
        options["max_sequence_length"] = tiny_flow.TEXT_LENGTH
        prompts, negative_prompts = tiny_flow.PROMPTS, tiny_flow.NEGATIVE_PROMPTS[model]
    else:
        prompts = tiny.XL_PROMPTS if model == "tiny-sdxl" else tiny.PROMPTS
        negative_prompts = tiny.NEGATIVE_PROMPTS
    images = [Image.fromarray(image) for image in edit_cases.images(model)]
    if run.masked:
        options["mask_image"] = [Image.fromarray(edit_cases.mask(model).astype(np.uint8) * 255)] * 2
    # An inpainting UNet's original is not encoded where the run begins from noise alone.
    from_noise = fills_masks and run.strength == 1
    posteriors = iter([outside] if from_noise else [posterior, outside])
    with ExitStack() as stack:
        stack.enter_context(patch.object(vae, "randn_tensor", lambda *_, **__: next(posteriors)))
        stack.enter_context(patch.object(sys.modules[type(pipe).__module__], "randn_tensor", lambda *_, **__: initial))
        return pipe(
            prompt=list(prompts),
            negative_prompt=list(negative_prompts),
            image=images,
            strength=run.strength,
            num_inference_steps=run.steps,
            # ZImagePipeline counts guidance from 0.
            guidance_scale=run.guidance_scale - (model == "tiny-z-image"),
            output_type="np",
            **options,
        ).images


def drawn_by_klein(pipe: Any, run: EditRun) -> Any:
    """One picture at a time: Flux2KleinInpaintPipeline takes no batch of images.

    It places reference images at times of the batch's size, where Flux2KleinPipeline, and this project, has 10. Neither
    takes images as small as these.
    """
    model = "tiny-klein"
    height, width = edit_cases.SIZES[model]
    noises = torch.from_numpy(edit_cases.noises(model)[0]).permute(0, 3, 1, 2)
    redrawn = edit_cases.mask(model) if run.masked else np.ones((height, width), bool)
    references = [Image.fromarray(image) for image in edit_cases.references(model)[: run.references]]
    pipe.register_to_config(is_distilled=run.guidance_scale == 1)
    place = staticmethod(lambda latents, *_: diffusers.Flux2KleinPipeline._prepare_image_ids(latents))
    pictures = []
    for prompt, image, noise in zip(tiny_flow.PROMPTS, edit_cases.images(model), noises, strict=True):
        images: dict[str, Any] = {"image": references, "height": height, "width": width, "latents": noise[None]}
        if run.strength is not None:
            mask = Image.fromarray(redrawn.astype(np.uint8) * 255)
            images = {"image": Image.fromarray(image), "mask_image": mask, "strength": run.strength}
            images |= {"image_reference": references[0]} if references else {}
        module = sys.modules[type(pipe).__module__]
        with ExitStack() as stack:
            stack.enter_context(patch.object(Flux2ImageProcessor, "check_image_input", staticmethod(lambda x: x)))
            stack.enter_context(patch.object(diffusers.Flux2KleinInpaintPipeline, "_prepare_image_ids", place))
            stack.enter_context(patch.object(module, "randn_tensor", lambda *_, noise=noise, **__: noise[None]))
            drawn = pipe(
                prompt=prompt,
                num_inference_steps=run.steps,
                guidance_scale=run.guidance_scale,
                max_sequence_length=tiny_flow.TEXT_LENGTH,
                text_encoder_out_layers=tiny_flow.HIDDEN_STATES[model],
                output_type="np",
                **images,
            )
        pictures.append(drawn.images[0])
    return np.stack(pictures)
