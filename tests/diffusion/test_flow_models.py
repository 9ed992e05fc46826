"""Networks of FLUX.2-klein and Z-Image against diffusers' and transformers', as recorded by tests/golden_flow.py."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from app.diffusion.models.chat_tokenizer import ChatTokenizer
from app.diffusion.models.config import VAEConfig
from app.diffusion.models.flow_config import Flux2Config, Flux2VAEConfig, Qwen3Config, ZImageConfig
from app.diffusion.models.flow_shapes import flux2_tensors, flux2_vae_tensors, qwen3_tensors, z_image_tensors
from app.diffusion.models.flux2 import Flux2
from app.diffusion.models.flux2_vae import Flux2VAE
from app.diffusion.models.loading import OneKey, load_module
from app.diffusion.models.qwen3 import Qwen3
from app.diffusion.models.shapes import Shape, vae_tensors
from app.diffusion.models.tensor_names import NOT_WEIGHTS, current_name
from app.diffusion.models.tensors import tensor_name, tensor_shape
from app.diffusion.models.transformer_layers import rms_norm, rms_scaled
from app.diffusion.models.vae import VAE
from app.diffusion.models.weight_files import find_tensors
from app.diffusion.models.z_image import ZImage
from tests import tiny_flow
from tests.published import FLOW_CHECKPOINTS

HIDDEN_STATES = {"FLUX.2-klein-4B": (9, 18, 27), "Z-Image-Turbo": (-2,)} | tiny_flow.HIDDEN_STATES
CLASSES: dict[tuple[str, str], tuple[Any, Any]] = {}
for klein in ("FLUX.2-klein-4B", "tiny-klein"):
    CLASSES |= {(klein, "transformer"): (Flux2Config, Flux2), (klein, "vae"): (Flux2VAEConfig, Flux2VAE)}
for z_image in ("Z-Image-Turbo", "tiny-z-image"):
    CLASSES |= {(z_image, "transformer"): (ZImageConfig, ZImage), (z_image, "vae"): (VAEConfig, VAE)}


def config_of(checkpoint: str, component: str, change: dict[str, Any]) -> tuple[Any, list[str]]:
    json = (FLOW_CHECKPOINTS | tiny_flow.MODELS)[checkpoint][component] | change
    problems: list[str] = []
    where = f"{component}/config.json"
    if component == "text_encoder":
        return Qwen3Config.from_json(json, problems, where, HIDDEN_STATES[checkpoint]), problems
    return CLASSES[checkpoint, component][0].from_json(json, problems, where), problems


def module_of(checkpoint: str, component: str, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """A network's config, and a function that builds it."""
    config, problems = config_of(checkpoint, component, {})
    assert not problems
    module_class = Qwen3 if component == "text_encoder" else CLASSES[checkpoint, component][1]
    rngs: Any = OneKey()
    return config, lambda: module_class(config, dtype=dtype, rngs=rngs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each tiny checkpoint in a folder of its own."""
    folder = tmp_path_factory.mktemp("flow")
    for model in tiny_flow.MODELS:
        tiny_flow.write_checkpoint(folder / model, model, tiny_flow.tensor_tables()[model])
    return folder


def load(folder: Path, model: str, component: str, dtype: Any = jnp.float32) -> Any:
    config, build = module_of(model, component, dtype)
    problems: list[str] = []
    tensors = find_tensors(folder / model / component, tiny_flow.STEMS[component], problems)
    if component == "text_encoder":
        tensors = {name: tensor for name, tensor in tensors.items() if not config.unread(name)}
    module = load_module(build, tensors, component, problems, problems)
    assert not problems
    return module


@lru_cache
def golden(model: str) -> dict[str, Any]:
    with np.load(Path(__file__).parents[1] / "golden" / f"{model}.npz") as archive:
        return dict(archive)


def relative_error(ours: Any, expected: Any) -> float:
    ours = np.asarray(ours, np.float32)
    assert ours.shape == expected.shape
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


call = nnx.jit(lambda module, *arguments: module(*arguments))
decode = nnx.jit(lambda vae, latents: vae.decode(latents))


def run(folder: Path, model: str, part: str, dtype: Any = jnp.float32) -> Any:
    inputs = tiny_flow.inputs(model)
    if part == "prompt_embeds":
        return call(load(folder, model, "text_encoder", dtype), inputs["input_ids"])
    if part == "decoded":
        vae = load(folder, model, "vae", dtype)
        latents = inputs["vae_latents"]
        return decode(vae, latents)
    names = ("timesteps", "prompt_embeds") if model == "tiny-klein" else ("clock", "prompt_embeds", "text_lengths")
    return call(load(folder, model, "transformer", dtype), inputs["latents"], *(inputs[name] for name in names))


PARTS = ("prompt_embeds", "velocity", "decoded")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("model", tiny_flow.MODELS)
def test_every_network_computes_what_diffusers_computes(folder: Path, model: str, part: str) -> None:
    assert relative_error(run(folder, model, part), golden(model)[part]) <= 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("model", tiny_flow.MODELS)
def test_denoisers_compute_in_bfloat16_on_request(folder: Path, model: str) -> None:
    velocity = run(folder, model, "velocity", jnp.bfloat16)
    assert velocity.dtype == jnp.bfloat16
    assert relative_error(velocity, golden(model)["velocity"]) <= 5e-2


def published_tensors(checkpoint: str, component: str, config: Any) -> dict[str, Shape]:
    """Those that are read, by their current names."""
    table = tiny_flow.expanded(tiny_flow.tensor_tables()[checkpoint][component])
    tensors = {current_name(name): tuple(shape) for name, shape in table.items()}
    unread = config.unread if component == "text_encoder" else NOT_WEIGHTS.__contains__
    return {name: shape for name, shape in tensors.items() if not unread(name)}


# Full-size checkpoints are held to the linter's shapes below, which are the same for every size and take no tracing.
@pytest.mark.slow
@pytest.mark.parametrize("component", tiny_flow.STEMS)
@pytest.mark.parametrize("checkpoint", tiny_flow.MODELS)
def test_modules_hold_exactly_the_tensors_of_checkpoints(checkpoint: str, component: str) -> None:
    config, build = module_of(checkpoint, component)
    parameters = nnx.to_flat_state(nnx.state(nnx.eval_shape(build), nnx.Param))
    ours = {tensor_name(path): tensor_shape(path, parameter.shape) for path, parameter in parameters}
    expected = published_tensors(checkpoint, component, config)
    assert tiny_flow.collapsed(ours) == tiny_flow.collapsed(expected)


SHAPES: dict[tuple[str, str], Callable[[Any], dict[str, Shape]]] = {
    ("klein", "text_encoder"): qwen3_tensors,
    ("klein", "transformer"): flux2_tensors,
    ("klein", "vae"): flux2_vae_tensors,
    ("z-image", "text_encoder"): qwen3_tensors,
    ("z-image", "transformer"): z_image_tensors,
    ("z-image", "vae"): vae_tensors,
}


@pytest.mark.parametrize("component", tiny_flow.STEMS)
@pytest.mark.parametrize("checkpoint", [*FLOW_CHECKPOINTS, *tiny_flow.MODELS])
def test_the_linter_expects_exactly_the_tensors_of_the_published_checkpoints(checkpoint: str, component: str) -> None:
    config, _ = config_of(checkpoint, component, {})
    expected = SHAPES["klein" if "klein" in checkpoint else "z-image", component](config)
    assert tiny_flow.collapsed(expected) == tiny_flow.collapsed(published_tensors(checkpoint, component, config))


@pytest.mark.slow
@pytest.mark.parametrize("model", tiny_flow.MODELS)
def test_prompts_become_the_messages_that_diffusers_gives_the_text_encoder(folder: Path, model: str) -> None:
    thinking = model == "tiny-z-image"
    tokenizer = ChatTokenizer(folder / model / "tokenizer", tiny_flow.TEXT_LENGTH, thinking=thinking)
    assert not [*tokenizer.problems(tiny_flow.MODELS[model]["text_encoder"]["vocab_size"])]
    tokens = tokenizer(tiny_flow.PROMPTS)
    assert np.array_equal(tokens.input_ids, golden(model)["input_ids"])
    assert tokens.truncated == (True, False)


@pytest.mark.parametrize(
    "checkpoint, component, change, problem",
    [
        ("tiny-klein", "transformer", {"guidance_embeds": True}, "guidance_embeds must be False, got True."),
        ("tiny-klein", "transformer", {"axes_dims_rope": [8, 8]}, "sum is attention_head_dim 16, got [8, 8]."),
        ("tiny-klein", "vae", {"decoder_block_out_channels": [8]}, "decoder_block_out_channels must be None, got [8]."),
        ("tiny-klein", "text_encoder", {"num_hidden_layers": 4}, "num_hidden_layers must be at least 5, got 4."),
        ("tiny-klein", "text_encoder", {"num_key_value_heads": 3}, "4 heads (num_attention_heads) cannot share 3"),
        ("tiny-z-image", "transformer", {"n_kv_heads": 1}, "n_kv_heads must be n_heads 3, got 1."),
        ("tiny-z-image", "transformer", {"siglip_feat_dim": 8}, "siglip_feat_dim must be None, got 8."),
    ],
)
def test_what_a_network_cannot_honour_is_a_problem(
    checkpoint: str, component: str, change: dict[str, Any], problem: str
) -> None:
    _, problems = config_of(checkpoint, component, change)
    assert [line for line in problems if problem in line] == problems != []


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_scaled_norm_is_the_norm_times_its_factor(dtype: Any) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 3840)) * jnp.geomspace(0.1, 10, 3)[None, :, None]
    factor = 1 + jax.random.normal(jax.random.key(1), (2, 1, 3840))
    norm = rms_norm(3840, 1e-5, dtype=dtype, rngs=nnx.Rngs(0))
    x = x.astype(dtype)
    wide = x.astype(jnp.float32)
    expected = wide / jnp.sqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + 1e-5) * factor
    scaled = rms_scaled(x, norm, factor)
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, expected, rtol=1e-5 if dtype == jnp.float32 else 2e-4)
