"""Runs diffusers in PyTorch on the cases that the tests replay, and writes what it answers to tests/golden/.

    python tests/make_golden.py           writes
    python tests/make_golden.py --check   compares with what is committed; each difference is a line, and exit 1

Needs the `parity` extra (torch, diffusers). Nothing under app/ takes part in making the answers.
"""

import argparse
import importlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

from tests import edit_cases, golden_edits, golden_flow, published, sampler_cases, tiny, tiny_flow

Arrays = dict[str, np.ndarray[Any, Any]]

GOLDEN = Path(__file__).parent / "golden"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed files instead of writing")
    parser.add_argument("files", nargs="*", help=f"only some of {', '.join(MAKERS)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.files) - set(MAKERS):
        parser.error(f"files must be among {', '.join(MAKERS)}, got {', '.join(sorted(unknown))}.")
    torch.set_num_threads(2)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    problems = 0
    for name in arguments.files or MAKERS:
        path = GOLDEN / name
        fresh = MAKERS[name]()
        if arguments.check:
            for line in differences(read(path) if path.exists() else {}, fresh):
                print(f"{name}: {line}")
                problems += 1
        else:
            write(path, fresh)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    if arguments.check:
        print(f"{problems} differences" if problems else "no differences")
    return 1 if problems else 0


def read(path: Path) -> Arrays:
    if path == tiny_flow.TENSORS:
        return flow_tensors(tiny_flow.tensor_tables())
    if path.suffix == ".json":
        return {
            f"{checkpoint} {component} {name}": np.array(shape)
            for checkpoint, components in tiny.tensor_shapes(path).items()
            for component, shapes in components.items()
            for name, shape in shapes.items()
        }
    with np.load(path) as archive:
        return dict(archive)


def write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".json":
        nested = nested_by_words(arrays) if path == tiny_flow.TENSORS else named(arrays)
        lines = json.dumps(nested, separators=(",", ":")).replace("],", "],\n").replace("{", "{\n")
        path.write_text(lines + "\n", "utf-8")
    else:
        np.savez_compressed(path, allow_pickle=False, **arrays)


def differences(committed: Arrays, fresh: Arrays) -> Iterator[str]:
    """One line for each array that is missing, left over, of another kind, or apart by more than float noise."""
    for key in sorted(committed.keys() | fresh.keys()):
        if key not in committed:
            yield f"{key} is not committed"
        elif key not in fresh:
            yield f"{key} is committed, but no longer made"
        elif (old := committed[key]).shape != (new := fresh[key]).shape or old.dtype != new.dtype:
            yield f"{key} is committed as {old.dtype}{list(old.shape)}, made as {new.dtype}{list(new.shape)}"
        elif old.dtype == np.uint8:
            # Rounding to grey levels turns float noise into a whole level here and there.
            apart = np.abs(new.astype(int) - old)
            if apart.max() > 1 or (apart > 0).mean() > 1e-3:
                yield f"{key} differs by {apart.max()} grey levels, in {(apart > 0).mean():.2%} of its values"
        elif not np.issubdtype(old.dtype, np.floating):
            if not np.array_equal(old, new):
                yield f"{key} differs"
        elif not (off := np.abs(new - old).max() / max(np.abs(old).max(), 1e-9)) <= 1e-5:
            yield f"{key} differs by {off:.1e} of its largest value"


def samplers() -> Arrays:
    """Every run end to end, one row per UNet evaluation and one for the end, in diffusers' own scaling."""
    noises = sampler_cases.noises()
    runs = (
        (f"{config} {sampler} {steps}", run_scheduler(scheduler_of(config, sampler, steps), noises))
        for config, sampler, steps in sampler_cases.cases()
    )
    return {"noises": noises, **recorded(runs)}


def sampler_edits() -> Arrays:
    """Likewise the runs that begin from an image."""
    noises = sampler_cases.noises()
    return recorded(
        (str(case), run_scheduler(scheduler_of(case.config, case.sampler, case.steps), noises, case))
        for case in sampler_cases.edit_cases()
    )


def scheduler_of(config: str, sampler: str, steps: int) -> Any:
    if config in sampler_cases.FLOWS:
        return flow_scheduler(sampler_cases.FLOWS[config], steps)
    scheduler = scheduler_for(sampler, sampler_cases.CONFIGS[config])
    scheduler.set_timesteps(steps)
    return scheduler


def recorded(runs: Iterable[tuple[str, Iterable[tuple[float, float, Any]]]]) -> Arrays:
    names, timesteps, scales, latents = [], [], [], []
    for name, rows in runs:
        for timestep, scale, x in rows:
            names.append(name)
            timesteps.append(timestep)
            scales.append(scale)
            latents.append(x)
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return {
        "cases": np.array(list(order)),
        "case": np.array([order[name] for name in names], np.int16),
        "timestep": np.array(timesteps, np.float32),
        "scale": np.array(scales, np.float32),
        "latents": np.stack(latents),
    }


def scheduler_for(sampler: str, config: dict[str, Any]) -> Any:
    """diffusers' own way to swap samplers: the checkpoint's scheduler, then Other.from_config(scheduler.config)."""
    checkpoint = getattr(diffusers, config["_class_name"]).from_config(config)
    plain: dict[str, Any] = {f"use_{levels}_sigmas": False for levels in ("karras", "exponential", "beta")}
    method, _, variant = sampler.rpartition("_")
    if variant in ("karras", "exponential", "beta"):
        options = plain | {f"use_{variant}_sigmas": True}
    elif variant == "trailing":
        options = plain | {"timestep_spacing": "trailing"}
    else:
        method, options = sampler, plain
    class_name, own = SCHEDULERS[method]
    # diffusers hides the class where torchsde is not installed, whose noise is replaced here.
    sys.modules.setdefault("torchsde", ModuleType("torchsde"))
    sde = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    scheduler_class: Any = getattr(sde if sampler.startswith("dpmpp_sde") else diffusers, class_name)
    known = inspect.signature(scheduler_class.__init__).parameters
    options = {name: value for name, value in {**options, **own}.items() if name in known}
    return scheduler_class.from_config(checkpoint.config, **options)


# clip_sample is as StableDiffusionPipeline has it where a config is silent. The other options are those that a class
# must not take from another's file.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {"clip_sample": False}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {"solver_type": "bh2"}),
}


def brownian(noises: Any, i: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The noise of evaluation i of DPM++ SDE, for a Brownian motion over sigma with fresh noise at each evaluation."""

    def increment(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        noise = torch.from_numpy(noises[i + 1])
        if i % 2 == 0:
            return noise
        shared = (sigma - (sigma * sigma_next).sqrt()) / (sigma - sigma_next)
        return shared.sqrt() * torch.from_numpy(noises[i]) + (1 - shared).sqrt() * noise

    return increment


def flow_scheduler(flow: sampler_cases.Flow, steps: int) -> Any:
    """As the pipelines of FLUX.2, FLUX.1 and Z-Image set it up."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(flow.config)
    if flow.dynamic == "flux2":
        mu = compute_empirical_mu(flow.image_tokens, steps)
    else:
        named = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(flow.image_tokens, *(scheduler.config[name] for name in named))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler


def run_scheduler(
    scheduler: Any, noises: Any, edit: sampler_cases.EditCase | None = None
) -> Iterator[tuple[float, float, Any]]:
    """(timestep, what scale_model_input divides by, latents before the evaluation); last (-1, 1, the result)."""
    begin = edit.begin * scheduler.order if edit else 0
    if hasattr(scheduler, "set_begin_index"):
        # Left to itself, a scheduler whose first two timesteps are equal starts at the second.
        scheduler.set_begin_index(begin)
    flow = isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    initial, original = torch.from_numpy(noises[0]), torch.from_numpy(sampler_cases.original())

    def noised(timestep: Any) -> torch.Tensor:
        at = timestep.reshape(1)
        return scheduler.scale_noise(original, at, initial) if flow else scheduler.add_noise(original, initial, at)

    timesteps = scheduler.timesteps[begin:]
    x = noised(timesteps[0]) if edit else initial * (1.0 if flow else scheduler.init_noise_sigma)
    module = sys.modules[type(scheduler).__module__]
    for i, timestep in enumerate(timesteps):
        ones, scaled = torch.ones(()), x
        if not flow:
            ones, scaled = scheduler.scale_model_input(ones, timestep), scheduler.scale_model_input(x, timestep)
        yield float(timestep), float(1 / ones), x.numpy().copy()
        out = torch.from_numpy(sampler_cases.fake_unet(scaled.numpy(), float(timestep)))
        noise = torch.from_numpy(noises[i + 1])
        scheduler.noise_sampler = brownian(noises, i)
        with patch.object(module, "randn_tensor", lambda *_, noise=noise, **__: noise, create=True):
            x = scheduler.step(out, timestep, x, **order_of(scheduler, i)).prev_sample
        if edit and edit.masked:  # as in StableDiffusionInpaintPipeline
            mask = torch.from_numpy(sampler_cases.redrawn())
            x = (1 - mask) * (noised(timesteps[i + 1]) if i < len(timesteps) - 1 else original) + mask * x
    yield -1.0, 1.0, x.numpy().copy()


def order_of(scheduler: Any, i: int) -> dict[str, int]:
    """diffusers' LMS takes its order from the schedule's index, though an edit has fewer outputs and loses terms."""
    return {"order": min(i + 1, 4)} if isinstance(scheduler, diffusers.LMSDiscreteScheduler) else {}


def tensors() -> Arrays:
    """Every tensor's shape, as "checkpoint component name", of full-size and tiny checkpoints, without their memory."""
    shapes = {}
    for checkpoint, configs in (published.CHECKPOINTS | published.XL_CHECKPOINTS | tiny.MODELS).items():
        for component in (name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if name in configs):
            with torch.device("meta"):
                module = build(component, configs[component])
            for name, tensor in module.state_dict().items():
                shapes[f"{checkpoint} {component} {name}"] = np.array(tensor.shape)
    return shapes


def flow_tensors(tables: dict[str, Any]) -> Arrays:
    return {
        f"{checkpoint} {component} {name}": np.array(shape, int)
        for checkpoint, components in tables.items()
        for component, shapes in components.items()
        for name, shape in shapes.items()
    }


def nested_by_words(shapes: Arrays) -> dict[str, Any]:
    """checkpoint -> component -> tensor -> shape."""
    nested: dict[str, Any] = {}
    for key, shape in shapes.items():
        checkpoint, component, name = key.split()
        nested.setdefault(checkpoint, {}).setdefault(component, {})[name] = shape.tolist()
    return nested


def named(shapes: Arrays) -> dict[str, Any]:
    """As tensors.json has it: an equal checkpoint is stored as its name."""
    nested = nested_by_words(shapes)
    equal = {name: next(other for other in nested if nested[other] == nested[name]) for name in nested}
    return {name: nested[name] if equal[name] == name else equal[name] for name in nested}


def build(component: str, config: dict[str, Any]) -> Any:
    if component.startswith("text_encoder"):
        return getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))
    return getattr(diffusers, config["_class_name"]).from_config(config)


def networks(model: str) -> Arrays:
    """A tiny checkpoint's tokens, submodules one by one, and whole pictures; images are channels last."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tiny.write_checkpoint(Path(folder), model, named(tensors())[model])
        pipeline_class: Any = diffusers.StableDiffusionPipeline
        pipe = pipeline_class.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        inputs = {name: torch.from_numpy(value) for name, value in tiny.inputs(model).items()}
        down = pipe.unet.down_blocks[1]
        tokens = pipe.tokenizer(
            tiny.PROMPTS, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True
        )
        answers = {
            "input_ids": torch.tensor(tokens.input_ids, dtype=torch.int32),
            "prompt_embeds": pipe.text_encoder(torch.tensor(tokens.input_ids))[0],
            "resnet": last(down.resnets[0](first(inputs["resnet"]), inputs["time"])),
            "transformer": last(
                down.attentions[0](first(inputs["transformer"]), inputs["context"][:2], return_dict=False)[0]
            ),
            "unet": last(
                pipe.unet(first(inputs["unet"]), inputs["timesteps"], inputs["context"], return_dict=False)[0]
            ),
            "moments": last(pipe.vae.encode(first(inputs["pixels"])).latent_dist.parameters),
            "decoded": last(pipe.vae.decode(first(inputs["vae_latents"]), return_dict=False)[0]),
        }
        answers = {name: value.numpy() for name, value in answers.items()}
        checkpoint_scheduler = pipe.scheduler
        for sampler, steps, guidance_scale in tiny.RUNS[model]:
            pipe.scheduler = scheduler_for(sampler, dict(checkpoint_scheduler.config))
            noise = first(torch.from_numpy(tiny.latents(model)))
            answers[f"{sampler} {steps} {guidance_scale}"] = pictures(
                pipe, model, tiny.PROMPTS, steps, guidance_scale, noise, negative_prompt=tiny.NEGATIVE_PROMPTS
            )
    return answers


def pictures(
    pipe: Any, model: str, prompts: Sequence[str], steps: int, guidance_scale: float, noise: Any, **fields: Any
) -> Any:
    """uint8 [B, H, W, 3] that a pipeline of diffusers draws from `noise`."""
    height, width = tiny.IMAGE_SIZES[model]
    images = pipe(
        prompts,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        latents=noise,
        output_type="np",
        **fields,
    ).images
    return (images * 255).round().astype(np.uint8)


def networks_xl(model: str) -> Arrays:
    """A tiny SDXL's tokens, what its texts become, its UNet, and whole pictures."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tiny.write_checkpoint(Path(folder), model, named(tensors())[model])
        pipe: Any = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        inputs = {name: torch.from_numpy(value) for name, value in tiny.inputs(model).items()}
        ids = {
            name: getattr(pipe, name)(tiny.PROMPTS, padding="max_length", max_length=24, truncation=True).input_ids
            for name in ("tokenizer", "tokenizer_2")
        }
        embeds, _, pooled, _ = pipe.encode_prompt(tiny.PROMPTS, do_classifier_free_guidance=False)
        added = {name: inputs[name] for name in ("text_embeds", "time_ids")}
        unet = pipe.unet(
            first(inputs["unet"]), inputs["timesteps"], inputs["context"], added_cond_kwargs=added, return_dict=False
        )
        answers = {f"{name} input_ids": np.array(value, np.int32) for name, value in ids.items()}
        answers |= {"prompt_embeds": embeds.numpy(), "text_embeds": pooled.numpy(), "unet": last(unet[0]).numpy()}
        answers["guidance"] = pipe.get_guidance_scale_embedding(torch.tensor([7.5 - 1]), 10)[0].numpy()
        answers["time_embedding"] = guided_time_embedding()
        scheduler = dict(pipe.scheduler.config)
        for number, (sampler, steps, guidance_scale, negative_prompts, fields) in enumerate(tiny.XL_RUNS):
            pipe.scheduler = scheduler_for(sampler, scheduler)
            noise = first(torch.from_numpy(tiny.latents(model)))
            answers[f"picture {number}"] = pictures(
                pipe, model, tiny.XL_PROMPTS, steps, guidance_scale, noise, negative_prompt=negative_prompts, **fields
            )
    return answers


def lcm() -> Arrays:
    """Whole pictures of a tiny latent consistency model, with recorded noise."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tiny.write_lcm_checkpoint(Path(folder), named(tensors())["tiny-sd2"])
        pipeline_class: Any = diffusers.LatentConsistencyModelPipeline
        pipe = pipeline_class.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        initial, *after = (first(torch.from_numpy(noise)) for noise in tiny.lcm_noises())
        left = iter(after)
        with patch.object(sys.modules[type(pipe.scheduler).__module__], "randn_tensor", lambda *_, **__: next(left)):
            return {"picture": pictures(pipe, "tiny-sd2", tiny.PROMPTS, *tiny.LCM_RUN, initial)}


def guided_time_embedding() -> Any:
    """A UNet's time embedding with the guidance scale as a condition."""
    module = diffusers.models.embeddings.TimestepEmbedding(8, 12, cond_proj_dim=10)
    names = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    module.load_state_dict({name: torch.from_numpy(tiny.weight("time", name, shape)) for name, shape in names.items()})
    return module(
        *(torch.from_numpy(tiny.noise(name, 2, size)) for name, size in (("time", 8), ("guidance", 10)))
    ).numpy()


def first(x: torch.Tensor) -> torch.Tensor:
    """Channels last to channels first."""
    return x.permute(0, 3, 1, 2)


def last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


MAKERS: dict[str, Callable[[], Arrays]] = {
    "samplers.npz": samplers,
    "sampler-edits.npz": sampler_edits,
    "tensors.json": tensors,
    **{f"{model}.npz": partial(networks, model) for model in ("tiny-sd1", "tiny-sd2")},
    "tiny-sdxl.npz": partial(networks_xl, "tiny-sdxl"),
    "tiny-lcm.npz": lcm,
    "flow_tensors.json": lambda: flow_tensors(golden_flow.tensor_tables()),
    **{f"{model}.npz": partial(golden_flow.networks, model) for model in tiny_flow.MODELS},
    **{f"{model}-edits.npz": partial(golden_edits.edits, model, scheduler_for) for model in edit_cases.RUNS},
    "tiny-inpainting.npz": partial(golden_edits.inpainting, "tiny-sd2", scheduler_for),
    "tiny-sdxl-inpainting.npz": partial(golden_edits.inpainting, "tiny-sdxl", scheduler_for),
}

if __name__ == "__main__":
    sys.exit(main())
