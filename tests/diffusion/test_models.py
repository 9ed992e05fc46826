"""Our networks against diffusers' and transformers', as recorded by tests/make_golden.py."""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from app.diffusion.models.attention import attend
from app.diffusion.models.clip import CLIPText
from app.diffusion.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from app.diffusion.models.loading import Checkpoint, OneKey, load_checkpoint
from app.diffusion.models.strips import Strips
from app.diffusion.models.tensor_names import squeezed
from app.diffusion.models.tensors import tensor_name, tensor_shape
from app.diffusion.models.tokenizer import Tokenizer
from app.diffusion.models.unet import UNet
from app.diffusion.models.vae import VAE
from app.diffusion.pipeline import Pipeline
from app.diffusion.samplers import Schedule
from app.types import ActiveSlot, PipelineSpec
from tests import edit_cases, tiny
from tests.diffusion.edits import assert_edits_are_those_of_diffusers, recorded_noise
from tests.diffusion.some_programs import compile_some
from tests.published import CHECKPOINTS

MODELS = ("tiny-sd1", "tiny-sd2")
STRIPS = {"tiny-sd1": (1, 4), "tiny-sd2": (1, 2, 4)}  # what takes long to compile is cut in one way
BUILDERS: dict[str, tuple[Any, Any]] = {
    "unet": (UNetConfig, UNet),
    "vae": (VAEConfig, VAE),
    "text_encoder": (CLIPTextConfig, CLIPText),
}
# What SD 1.x's own files call these tensors, that is, diffusers before 0.17 and transformers before 5.
OLD_VAE_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

Load = Callable[..., Checkpoint]


@lru_cache
def golden(model: str) -> dict[str, Any]:
    with np.load(Path(__file__).parents[1] / "golden" / f"{model}.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Writes a tiny checkpoint and loads it, once for each model and way of writing."""

    @lru_cache
    def load(model: str, dtype: Any = np.float32, rename: Any = lambda component, name: name) -> Checkpoint:
        folder = tmp_path_factory.mktemp(model)
        tiny.write_checkpoint(folder, model, tiny.tensor_shapes()[model], dtype=dtype, rename=rename)
        return load_checkpoint(folder)

    return load


def relative_error(ours: Any, expected: Any) -> float:
    ours = np.asarray(ours, np.float32)
    assert ours.shape == expected.shape
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


call = nnx.jit(lambda module, *arguments: module(*arguments))
encode = nnx.jit(lambda vae, pixels: vae.encode(pixels))
decode = nnx.jit(lambda vae, latents: vae.decode(latents))


def run(checkpoint: Checkpoint, model: str, part: str) -> Any:
    """One submodule on its recorded inputs."""
    inputs = tiny.inputs(model)
    down = checkpoint.networks["unet"].down_blocks[1]
    if part == "prompt_embeds":
        return call(checkpoint.networks["text_encoder"], golden(model)["input_ids"])
    if part == "resnet":
        return call(down.resnets[0], inputs["resnet"], inputs["time"])
    if part == "transformer":
        return call(down.attentions[0], inputs["transformer"], inputs["context"][:2])
    if part == "unet":
        return call(checkpoint.networks["unet"], inputs["unet"], inputs["timesteps"], inputs["context"])
    if part == "moments":
        return np.concatenate(encode(checkpoint.networks["vae"], inputs["pixels"]), axis=-1)
    return decode(checkpoint.networks["vae"], inputs["vae_latents"] * checkpoint.networks["vae"].config.scaling_factor)


PARTS = ("prompt_embeds", "resnet", "transformer", "unet", "moments", "decoded")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_submodule_computes_what_diffusers_computes(load: Load, model: str, part: str) -> None:
    # It measures 4e-6; above 1e-4, GELU's tanh approximation would pass for the exact one.
    assert relative_error(run(load(model), model, part), golden(model)[part]) <= 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_images_cut_into_strips_are_what_whole_ones_are(load: Load, model: str) -> None:
    checkpoint, inputs = load(model), tiny.inputs(model)
    latents = tiny.noise("strips", 2, 16, 8, 4)

    @nnx.jit(static_argnums=2)
    def both(unet: Any, vae: Any, strips: Strips) -> tuple[jax.Array, jax.Array]:
        predicted = unet(latents, inputs["timesteps"][:2], inputs["context"][:2], strips=strips)
        return predicted, vae.decode(latents, strips=strips)

    whole, *cut = (
        both(checkpoint.networks["unet"], checkpoint.networks["vae"], strips) for strips in map(Strips, STRIPS[model])
    )
    for parts in cut:
        assert all(relative_error(ours, expected) <= 1e-5 for ours, expected in zip(parts, whole, strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_prompts_become_the_tokens_that_diffusers_gives_the_text_encoder(tmp_path: Path, model: str) -> None:
    folder = tiny.write_checkpoint(tmp_path, model, {})
    length = tiny.MODELS[model]["text_encoder"]["max_position_embeddings"]
    tokens = Tokenizer(folder / "tokenizer", length)(tiny.PROMPTS)
    assert np.array_equal(tokens.input_ids, golden(model)["input_ids"])
    assert tokens.truncated == (False, True)


@pytest.fixture(scope="module", params=MODELS)
def drawn(request: pytest.FixtureRequest, load: Load) -> tuple[str, Pipeline]:
    """A model's name and its pipeline."""
    model: str = request.param
    height, width = tiny.IMAGE_SIZES[model]
    edits = model in edit_cases.RUNS
    spec = PipelineSpec(model, sizes=((width, height),), batch_buckets=(2,), max_steps=8, edits=edits)
    pipeline = Pipeline(load(model), spec)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if edits:
            recorded_noise(monkeypatch, model)
        compile_some(pipeline, "encode", "insert", "rows 4", "decode")
    return model, pipeline


@pytest.mark.slow
def test_edits_are_within_a_grey_level_of_diffusers(drawn: tuple[str, Pipeline]) -> None:
    model, pipeline = drawn
    if model in edit_cases.RUNS:
        prompts, negatives = pipeline.encode(tiny.PROMPTS), pipeline.encode(tiny.NEGATIVE_PROMPTS)
        assert_edits_are_those_of_diffusers(pipeline, model, prompts, negatives)


@pytest.mark.slow
def test_whole_pictures_are_within_a_grey_level_of_diffusers(drawn: tuple[str, Pipeline]) -> None:
    model, pipeline = drawn
    (size,) = pipeline.sizes
    prompts, negative_prompts = pipeline.encode(tiny.PROMPTS), pipeline.encode(tiny.NEGATIVE_PROMPTS)
    for sampler, steps, guidance_scale in tiny.RUNS[model]:
        table = pipeline.table(sampler, steps)
        state = pipeline.empty_state(size)
        for slot, texts in enumerate(zip(prompts, negative_prompts, strict=True)):
            state = pipeline.insert(state, slot, *texts, table, guidance_scale, seed=0)
        latents = np.array(state.latents)
        latents[:2] = table.initial_scale * tiny.latents(model)
        state = state._replace(latents=jax.device_put(latents, pipeline.everywhere))
        state, _ = pipeline.step(state, [ActiveSlot(slot, guided=True) for slot in (0, 1)], len(table))
        ours = np.asarray(pipeline.decode(state, [0, 1])).astype(int)
        apart = np.abs(ours - golden(model)[f"{sampler} {steps} {guidance_scale}"])
        assert (apart <= 1).all(axis=-1).mean() >= 0.999, f"{sampler}: {apart.max()} grey levels apart"


@pytest.mark.slow
@pytest.mark.parametrize("component", BUILDERS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_modules_hold_exactly_the_tensors_of_the_published_checkpoints(name: str, component: str) -> None:
    config_class, module_class = BUILDERS[component]
    problems: list[str] = []
    config = config_class.from_json(CHECKPOINTS[name][component], problems)
    assert not problems
    rngs = OneKey()
    module = nnx.eval_shape(lambda: module_class(config, rngs=rngs))
    parameters = nnx.to_flat_state(nnx.state(module, nnx.Param))
    ours = {tensor_name(path): squeezed(tensor_shape(path, parameter.shape)) for path, parameter in parameters}
    expected = {tensor: squeezed(tuple(shape)) for tensor, shape in tiny.tensor_shapes()[name][component].items()}
    assert ours == expected


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_schedule_of_a_published_checkpoint_is_understood(name: str) -> None:
    schedule = Schedule.from_config(CHECKPOINTS[name]["scheduler"])
    assert schedule.prediction_type == ("epsilon" if "v1" in name else "v_prediction")
    assert schedule.timestep_spacing is None and schedule.steps_offset == 1


def old_names(component: str, name: str) -> str:
    if component == "text_encoder":
        return f"text_model.{name}"
    if component == "vae":
        for new, old in OLD_VAE_NAMES.items():
            name = name.replace(new, old)
    return name


@pytest.mark.slow
def test_tensor_names_of_old_checkpoints_are_understood(load: Load) -> None:
    new, old = load("tiny-sd1"), load("tiny-sd1", rename=old_names)
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in load_file(
        old.path / "vae" / "diffusion_pytorch_model.safetensors"
    )
    for component in ("vae", "text_encoder"):
        states = (nnx.state(checkpoint.networks[component], nnx.Param) for checkpoint in (new, old))
        jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_hold_the_same_model(load: Load, dtype: Any) -> None:
    checkpoint = load("tiny-sd2", dtype=dtype)
    for part in ("prompt_embeds", "unet", "decoded"):
        assert relative_error(run(checkpoint, "tiny-sd2", part), golden("tiny-sd2")[part]) <= 3e-2


@pytest.mark.slow
def test_networks_compute_in_bfloat16_on_request(load: Load) -> None:
    checkpoint = load_checkpoint(load("tiny-sd2").path, dtype=jnp.bfloat16)
    for part in ("prompt_embeds", "unet", "decoded"):
        answer = run(checkpoint, "tiny-sd2", part)
        assert answer.dtype == jnp.bfloat16
        assert relative_error(answer, golden("tiny-sd2")[part]) <= 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("queries, keys", [(64, 64), (64, 77), (200, 200), (1000, 1000)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)], ids=["float32", "bfloat16"])
def test_attention_is_the_same_over_few_keys_and_over_many(
    queries: int, keys: int, dtype: Any, tolerance: float
) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, 4 * 8)), dtype) for length in (queries, keys, keys))
    by_head = [np.asarray(x, np.float64).reshape(2, -1, 4, 8).swapaxes(1, 2) for x in (q, k, v)]
    logits = by_head[0] @ by_head[1].swapaxes(2, 3) / np.sqrt(8)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True) @ by_head[2]).swapaxes(1, 2).reshape(q.shape)
    answer = attend(q, k, v, heads=4)
    assert answer.dtype == dtype
    assert relative_error(answer, expected) <= tolerance


def test_the_logits_of_many_keys_never_stand_in_memory_at_once_on_a_cpu() -> None:
    rows, tokens, heads = 2, 2048, 4
    x = jax.ShapeDtypeStruct((rows, tokens, heads * 8), jnp.float32)
    memory = jax.jit(partial(attend, heads=heads)).lower(x, x, x).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < rows * heads * tokens * tokens * 4 / 8


@pytest.mark.slow
def test_all_problems_of_a_checkpoint_are_said_at_once(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path, "tiny-sd1", tiny.tensor_shapes()["tiny-sd1"])
    unet, vae = (folder / component / "diffusion_pytorch_model.safetensors" for component in ("unet", "vae"))
    tensors = load_file(unet)
    tensors["conv_in.lora_down"] = tensors.pop("conv_in.bias")
    save_file(tensors, unet)
    save_file(load_file(vae) | {"quant_conv.weight": np.zeros((8, 4, 1, 1), np.float32)}, vae)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert "unet: tensor conv_in.bias is missing." in message
    assert "unet: tensor conv_in.lora_down is not one that this architecture has." in message
    assert "vae: tensor quant_conv.weight must have shape [8, 8, 1, 1], got [8, 4, 1, 1]." in message
