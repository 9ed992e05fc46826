"""What make_golden.py makes of flow models: the tensors of checkpoints, and the answers of tiny networks."""

import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from tests import published, tiny_flow

Arrays = dict[str, np.ndarray[Any, Any]]


def tensor_tables() -> dict[str, dict[str, tiny_flow.Shapes]]:
    """The shape of every tensor of full-size and tiny checkpoints, without their memory."""
    tables: dict[str, dict[str, tiny_flow.Shapes]] = {}
    for checkpoint, configs in (published.FLOW_CHECKPOINTS | tiny_flow.MODELS).items():
        tables[checkpoint] = {}
        for component in tiny_flow.STEMS:
            with torch.device("meta"):
                module = build(component, configs[component])
            tables[checkpoint][component] = tiny_flow.collapsed(
                {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
            )
    return tables


def build(component: str, config: dict[str, Any]) -> Any:
    if component == "text_encoder":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config))
    return getattr(diffusers, config["_class_name"]).from_config(config)


def networks(model: str) -> Arrays:
    """A tiny checkpoint's tokens, its networks one by one, and whole pictures; images are channels last."""
    inputs = {name: torch.from_numpy(value) for name, value in tiny_flow.inputs(model).items()}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tiny_flow.write_checkpoint(Path(folder), model, tensor_tables()[model])
        pipeline_class: Any = getattr(diffusers, "Flux2KleinPipeline" if model == "tiny-klein" else "ZImagePipeline")
        pipe = pipeline_class.from_pretrained(folder)
        ids = inputs["input_ids"].long()
        states = pipe.text_encoder(
            input_ids=torch.where(ids < 0, ~ids, ids), attention_mask=ids >= 0, output_hidden_states=True
        ).hidden_states
        embeds = torch.cat([states[i] for i in tiny_flow.HIDDEN_STATES[model]], dim=-1)
        predict = flux2 if model == "tiny-klein" else z_image
        answers = {"prompt_embeds": embeds, "velocity": predict(pipe, inputs), "decoded": decoded(pipe, inputs)}
        arrays = {name: value.numpy() for name, value in answers.items()}
        pipe.set_progress_bar_config(disable=True)
        return arrays | {"input_ids": input_ids(pipe, thinking=model == "tiny-z-image")} | pictures(pipe, model)


def input_ids(pipe: Any, *, thinking: bool) -> np.ndarray[Any, Any]:
    """As both pipelines make them of prompts, with the complement of the id for padding."""
    messages = [
        pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for prompt in tiny_flow.PROMPTS
    ]
    options = {"padding": "max_length", "truncation": True, "max_length": tiny_flow.TEXT_LENGTH}
    tokens = pipe.tokenizer(messages, return_tensors="np", **options)
    ids: np.ndarray[Any, Any] = np.where(tokens.attention_mask, tokens.input_ids, ~tokens.input_ids).astype(np.int32)
    return ids


def pictures(pipe: Any, model: str) -> Arrays:
    """Whole runs. ZImagePipeline counts guidance from 0, where this project counts from 1."""
    height, width = tiny_flow.IMAGE_SIZES[model]
    images = {}
    for run, (steps, guidance_scale) in enumerate(tiny_flow.RUNS[model]):
        options: dict[str, Any] = {"max_sequence_length": tiny_flow.TEXT_LENGTH}
        if model == "tiny-klein":
            pipe.register_to_config(is_distilled=run == 0)
            options |= {"text_encoder_out_layers": tiny_flow.HIDDEN_STATES[model], "guidance_scale": guidance_scale}
        else:
            options |= {
                "negative_prompt": list(tiny_flow.NEGATIVE_PROMPTS[model]),
                "guidance_scale": guidance_scale - 1,
            }
        pixels = pipe(
            prompt=list(tiny_flow.PROMPTS),
            height=height,
            width=width,
            num_inference_steps=steps,
            latents=torch.from_numpy(tiny_flow.latents(model)).permute(0, 3, 1, 2),
            output_type="np",
            **options,
        ).images
        images[f"{steps} {guidance_scale}"] = (pixels * 255).round().astype(np.uint8)
    return images


def flux2(pipe: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    rows, height, width, channels = inputs["latents"].shape
    velocity = pipe.transformer(
        hidden_states=inputs["latents"].reshape(rows, -1, channels),
        timestep=inputs["timesteps"] / 1000,
        encoder_hidden_states=inputs["prompt_embeds"],
        txt_ids=pipe._prepare_text_ids(inputs["prompt_embeds"]),
        img_ids=pipe._prepare_latent_ids(inputs["latents"].permute(0, 3, 1, 2)),
        return_dict=False,
    )[0]
    return velocity.reshape(rows, height, width, channels)


def z_image(pipe: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    latents = inputs["latents"].permute(0, 3, 1, 2)[:, :, None]
    texts = [embeds[:length] for embeds, length in zip(inputs["prompt_embeds"], inputs["text_lengths"], strict=True)]
    velocity = pipe.transformer(list(latents), inputs["clock"], texts, return_dict=False)[0]
    return torch.stack(velocity)[:, :, 0].permute(0, 2, 3, 1).contiguous()


def decoded(pipe: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """As the pipelines decode what their denoiser knows as latents."""
    latents, vae = inputs["vae_latents"].permute(0, 3, 1, 2), pipe.vae
    if hasattr(vae, "bn"):
        deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        latents = pipe._unpatchify_latents(latents * deviation + vae.bn.running_mean.view(1, -1, 1, 1))
    else:
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(latents, return_dict=False)[0].permute(0, 2, 3, 1).contiguous()
