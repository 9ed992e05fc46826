"""Trains the bundled demo model (assets/demo-model) from nothing, on pictures that demo/scenes.py draws.

    python -m demo.train                 # about 2.5 hours on two cores
    python -m demo.train --export-only   # writes the folder from the last checkpoint

Five stages, each resumable from its last checkpoint in `--work`: the VAE learns to redraw pictures; a pool of scenes
is drawn and encoded once; the text encoder learns what captions mean; the UNet learns, and the text encoder with it,
to denoise the pool's latents; the decoder learns on for sharper pictures. The networks are the ones that are served.
What is written is a diffusers folder like any other.
"""

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, serialization
from safetensors.numpy import save_file

from app.diffusion.models.clip import CLIPText
from app.diffusion.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from app.diffusion.models.loading import load_checkpoint, to_tensors
from app.diffusion.models.tokenizer import Tokenizer
from app.diffusion.models.unet import UNet
from app.diffusion.models.vae import VAE
from app.diffusion.samplers import Schedule, alphas_bar_of
from cluster.terminal import Progress, Stop, say, span
from demo import scenes
from jobs.entry import Invalid, Parser, path, run, whole

VAE_JSON: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 8,
    "layers_per_block": 1,
    "mid_block_add_attention": False,
    "norm_num_groups": 1,
    "out_channels": 3,
    "sample_size": 128,
    "scaling_factor": 1.0,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
UNET_JSON: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": [2, 4, 4],
    "block_out_channels": [48, 112, 144],
    "center_input_sample": False,
    "cross_attention_dim": 160,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 8,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 8,
    "out_channels": 8,
    "sample_size": 16,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
TEXT_JSON: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": 160,
    "intermediate_size": 640,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 32,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "projection_dim": 160,
}
# Ends far noisier than Stable Diffusion's 0.012: at the last timestep 1.5 % of the picture is left instead of 6.8 %,
# so that a white and a black background are both within reach of pure noise (Lin et al. 2023).
SCHEDULER_JSON: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every number of the training; the model card repeats them."""

    seed: int = 0
    vae_steps: int = 3000
    vae_batch: int = 4
    vae_learning_rate: float = 8e-4
    vae_ema: float = 0.995
    vae_kl_weight: float = 3e-5
    pool: int = 20_000
    text_steps: int = 3000
    text_batch: int = 64
    text_learning_rate: float = 1e-3
    unet_steps: int = 7000
    unet_batch: int = 64
    unet_learning_rate: float = 1e-3
    unet_ema: float = 0.998
    prompt_dropout: float = 0.1
    decoder_steps: int = 3000
    decoder_learning_rate: float = 8e-4
    decoder_noise: float = 0.5  # of latents that spread by 2
    warmup_steps: int = 100
    checkpoint_steps: int = 200


STAGES = {"vae": "VAE", "text": "text encoder", "unet": "UNet and text encoder", "decoder": "decoder, sharpened"}

State = dict[str, Any]
Network = TypeVar("Network", bound=nnx.Module)


def main() -> str:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=path, default="assets/demo-model", help="folder to write (%(default)s)")
    parser.add_argument("--work", type=path, default=".cache/train-demo", help="checkpoints (%(default)s)")
    parser.add_argument("--export-only", action="store_true", help="write the folder from the last checkpoint")
    parser.add_argument("--start-from", type=path, help="folder whose networks to train on (from nothing)")
    parser.add_argument(
        "--average",
        action="store_true",
        help="write the mean of UNets and text encoders: --start-from's and the trained",
    )
    for field in dataclasses.fields(Recipe):
        kind = float if isinstance(field.default, float) else whole(0, 10**9)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help="%(default)s")
    args = parser.parse_args()
    if args.average and not args.start_from:
        parser.error("--average needs --start-from: the weights to average with.")
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})

    try:
        earlier = load_checkpoint(args.start_from) if args.start_from else None
    except ValueError as error:
        raise Invalid(f"--start-from: {error}") from None
    args.work.mkdir(parents=True, exist_ok=True)
    hold(args.work, recipe, args.start_from)
    words = (earlier.folder if earlier else args.work) / "tokenizer"
    if not words.exists():  # kept, as its training breaks ties by chance
        words.mkdir(parents=True)
        write_tokenizer(words)
    tokenizer = Tokenizer(words, TEXT_JSON["max_position_embeddings"])

    steps = dict.fromkeys(STAGES, 0) if args.export_only else {s: getattr(recipe, f"{s}_steps") for s in STAGES}
    vae = earlier.vae if earlier else train_vae(recipe, args.work, steps["vae"])
    known = vae.config.scaling_factor  # of an earlier UNet, which has learned with it
    vae.config = vae_config()  # the factor that scales latents is the pool's, and counts only in what is written
    pool = encoded_pool(recipe, args.work, vae, tokenizer)
    if earlier:
        pool["scaling_factor"] = np.array(known, np.float32)
    if earlier and earlier.text_encoder.config == text_config(tokenizer):
        text_encoder = earlier.text_encoder
    else:
        text_encoder = train_text_encoder(recipe, args.work, tokenizer, steps["text"])
    unet = earlier.unet if earlier else UNet(UNetConfig.from_json(UNET_JSON, []), rngs=nnx.Rngs(recipe.seed + 1))
    unet, text_encoder = train_unet(recipe, args.work, pool, tokenizer, unet, text_encoder, steps["unet"])
    if args.average:
        before = load_checkpoint(args.start_from)  # again, as training has used up the first one's arrays
        unet, text_encoder = mean_of(before.unet, unet), mean_of(before.text_encoder, text_encoder)
    vae = sharpen_decoder(recipe, args.work, vae, steps["decoder"])
    shutil.copytree(words, args.out / "tokenizer", dirs_exist_ok=True)
    export(args.out, vae, unet, text_encoder, scaling_factor=float(pool["scaling_factor"]))
    networks = {"VAE": vae, "UNet": unet, "text encoder": text_encoder}
    write_card(args.out, args.work, recipe, networks, earlier.folder if earlier else None, args.average)
    return f"The demo model stands in {args.out}, its checkpoints in {args.work}."


# --- the VAE ---------------------------------------------------------------------------------------------------------


def train_vae(recipe: Recipe, work: Path, steps: int) -> VAE:
    """Redraws pictures through 16x16x8 latents."""
    vae = VAE(vae_config(), rngs=nnx.Rngs(recipe.seed))
    # Latents start almost without noise: from a variance of one, nothing but grey comes through for a thousand steps.
    log_variances = jnp.arange(2 * vae.config.latent_channels) >= vae.config.latent_channels
    assert vae.quant_conv.bias is not None
    vae.quant_conv.bias[...] = jnp.where(log_variances, jnp.float32(-4), 0)  # no weak type, which would compile twice
    graph, params = nnx.split(vae)
    optimizer = adamw(recipe.vae_learning_rate, recipe.vae_steps, recipe.warmup_steps)

    def loss_of(params: Any, pixels: jax.Array, key: jax.Array) -> jax.Array:
        vae = nnx.merge(graph, params)
        mean, log_variance = vae.encode(pixels)
        latents = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        kl = (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean() / 2
        return redrawing_loss(vae.decode(latents) - pixels) + recipe.vae_kl_weight * kl

    step = make_step(loss_of, optimizer, ema=recipe.vae_ema)
    batches = partial(fresh_pictures, recipe, 1, 2)  # two things to each: an empty background teaches little
    state = train("vae", work, recipe, start(params, optimizer), step, batches, steps)
    return nnx.merge(graph, state["ema"])


def sharpen_decoder(recipe: Recipe, work: Path, vae: VAE, steps: int) -> VAE:
    """Trains the decoder on for crisper edges. The encoder stays, so the pool and the UNet stay right."""
    trained = nnx.Any(nnx.PathContains("decoder"), nnx.PathContains("post_quant_conv"))
    graph, *states = nnx.split(vae, trained, ...)
    params, fixed = states
    optimizer = adamw(recipe.decoder_learning_rate, recipe.decoder_steps, recipe.warmup_steps)

    def loss_of(params: Any, batch: tuple[Any, jax.Array], key: jax.Array) -> jax.Array:
        fixed, pixels = batch
        vae = nnx.merge(graph, params, fixed)
        mean, _ = vae.encode(pixels)
        # The UNet's latents are never quite what the encoder's are: sometimes close, sometimes less so.
        level_key, noise_key = jax.random.split(key)
        level = jax.random.uniform(level_key, (mean.shape[0], 1, 1, 1), maxval=recipe.decoder_noise)
        latents = mean + level * jax.random.normal(noise_key, mean.shape)
        return redrawing_loss(vae.decode(jax.lax.stop_gradient(latents)) - pixels)

    def batches(step: int) -> tuple[Any, jax.Array]:
        return fixed, fresh_pictures(recipe, 4, None, step)

    step = make_step(loss_of, optimizer, ema=recipe.vae_ema)
    state = train("decoder", work, recipe, start(params, optimizer), step, batches, steps)
    return nnx.merge(graph, state["ema"], fixed)


def redrawing_loss(error: jax.Array) -> jax.Array:
    """Colours, and differences between neighbouring pixels: edges."""
    edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (1, 2))
    return jnp.abs(error).mean() + (error**2).mean() + edges


def fresh_pictures(recipe: Recipe, stream: int, objects: int | None, step: int) -> jax.Array:
    """Pixels [B, 128, 128, 3] in [-1, 1], the same for the same stream and step."""
    rng = np.random.default_rng([recipe.seed, stream, step])
    drawn = [scenes.draw(scenes.sample_scene(rng, objects=objects)) for _ in range(recipe.vae_batch)]
    return jnp.asarray(np.stack(drawn), jnp.float32) / 127.5 - 1


def vae_config() -> VAEConfig:
    return VAEConfig.from_json(VAE_JSON, [])


# --- the pool --------------------------------------------------------------------------------------------------------


WORDINGS = 4  # captions of one scene


def encoded_pool(recipe: Recipe, work: Path, vae: VAE, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """`recipe.pool` scenes, drawn, captioned and encoded once: the UNet never sees a pixel."""
    file = work / "pool.npz"
    if file.exists():
        return dict(np.load(file))
    graph, params = nnx.split(vae)
    encode = jax.jit(lambda params, pixels: nnx.merge(graph, params).encode(pixels)[0])
    latents, captions = [], []
    with Progress() as progress:
        for first in range(0, recipe.pool, 64):
            rng = np.random.default_rng([recipe.seed, 2, first])
            batch = [pool_scene(rng) for _ in range(64)]
            pixels = np.stack([scenes.draw(scene) for scene in batch])
            latents.append(np.asarray(encode(params, jnp.asarray(pixels, jnp.float32) / 127.5 - 1), np.float16))
            captions += [scenes.caption(scene, rng) for scene in batch for _ in range(WORDINGS)]
            progress.show({"pool": ("drawing", f"{min(first + 64, recipe.pool)} of {recipe.pool} scenes")})
    found = np.concatenate(latents)[: recipe.pool]
    tokens = tokenizer(captions[: len(found) * WORDINGS])
    if any(tokens.truncated):
        raise RuntimeError(f"a caption is longer than {tokenizer.length} tokens")
    pool: dict[str, Any] = {
        "latents": found,
        "input_ids": tokens.input_ids.reshape(len(found), WORDINGS, -1),
        "scaling_factor": np.float32(1 / found.astype(np.float32).std()),
    }
    partial = work / "pool.partial.npz"
    np.savez(partial, **pool)
    os.replace(partial, file)
    return pool


def pool_scene(rng: np.random.Generator) -> scenes.Scene:
    """More of what is harder to learn than `scenes.sample_scene` has: half hold two things, a third a small one."""
    if rng.random() < 1 / 2:
        return scenes.sample_scene(rng, objects=2)
    small = rng.random() < 2 / 3
    while (scene := scenes.sample_scene(rng, objects=1)).size_word != "small" and small:
        pass
    return scene


# --- the text encoder -------------------------------------------------------------------------------------------------

GRID = 4  # cells along each side of the picture


def train_text_encoder(recipe: Recipe, work: Path, tokenizer: Tokenizer, steps: int) -> CLIPText:
    """Learns what captions mean before a UNet has to find it in noise, as CLIP's encoder did before Stable Diffusion.

    From each token behind the caption's last word, a linear reader that is thrown away afterwards must tell the
    background and, for each cell of a coarse grid, which thing of which colour covers it.
    """
    rngs = nnx.Rngs(recipe.seed + 2)
    kinds, colours, backgrounds = [*scenes.KINDS], [*scenes.COLOURS], [*scenes.BACKGROUNDS]
    classes = [len(backgrounds)] + [len(kinds) + 1] * GRID**2 + [len(colours) + 1] * GRID**2
    reader = nnx.Linear(TEXT_JSON["hidden_size"], sum(classes), rngs=rngs)
    graph, params = nnx.split((CLIPText(text_config(tokenizer), rngs=rngs), reader))
    optimizer = adamw(recipe.text_learning_rate, recipe.text_steps, recipe.warmup_steps)
    ends = np.cumsum(classes)[:-1]

    def batches(step: int) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng([recipe.seed, 5, step])
        drawn = [scenes.sample_scene(rng) for _ in range(recipe.text_batch)]
        input_ids = tokenizer([scenes.caption(scene, rng) for scene in drawn]).input_ids
        answers = np.zeros((len(drawn), len(classes)), np.int32)  # 0 in a cell: nothing there
        for row, scene in zip(answers, drawn, strict=True):
            row[0] = backgrounds.index(scene.background)
            for thing in scene.things:
                where = covered(thing)
                row[1:][: GRID**2][where] = kinds.index(thing.kind) + 1
                row[1 + GRID**2 :][where] = colours.index(thing.colour) + 1
        return jnp.asarray(input_ids), jnp.asarray(answers)

    def loss_of(params: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array) -> jax.Array:
        input_ids, answers = batch
        text_encoder, reader = nnx.merge(graph, params)
        said = jnp.split(reader(text_encoder(input_ids)), ends, axis=-1)
        behind = input_ids == tokenizer.tokenizer.eos_token_id
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(answers[:, [i]], behind.shape))
            for i, logits in enumerate(said)
        ]
        return jnp.mean(jnp.stack(losses), where=behind)

    step = make_step(loss_of, optimizer, ema=recipe.vae_ema)
    state = train("text", work, recipe, start(params, optimizer), step, batches, steps)
    text_encoder, _ = nnx.merge(graph, state["ema"])
    return text_encoder


def covered(thing: scenes.Thing) -> np.ndarray:
    """Which cells of the grid, row by row, have their centre within the thing's square."""
    centres = (np.arange(GRID) + 0.5) / GRID
    across, down = (np.abs(centres - middle) < thing.size / 2 for middle in (thing.x, thing.y))
    return (down[:, None] & across[None]).ravel()


# --- the UNet and the text encoder together ---------------------------------------------------------------------------


def train_unet(
    recipe: Recipe,
    work: Path,
    pool: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    unet: UNet,
    text_encoder: CLIPText,
    steps: int,
) -> tuple[UNet, CLIPText]:
    """v-prediction (Salimans and Ho 2022) on the pool's latents, prompts dropped now and then for guidance."""
    unet_graph, unet_params = nnx.split(unet)
    text_graph, text_params = nnx.split(text_encoder)
    optimizer = adamw(recipe.unet_learning_rate, recipe.unet_steps, recipe.warmup_steps)
    empty = jnp.asarray(tokenizer([""]).input_ids)
    alphas_cumprod = jnp.asarray(alphas_bar_of(Schedule.from_config(SCHEDULER_JSON)), jnp.float32)

    def loss_of(params: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array) -> jax.Array:
        latents, input_ids = batch
        keys = jax.random.split(key, 4)
        count = latents.shape[0]
        # One timestep from each of `count` equal strata: the same mean, far less noise from step to step.
        strata = (jnp.arange(count) + jax.random.uniform(keys[0], (count,))) / count
        timesteps = jnp.minimum(jax.random.permutation(keys[1], strata) * 1000, 999).astype(jnp.int32)
        noise = jax.random.normal(keys[2], latents.shape)
        alpha = jnp.sqrt(alphas_cumprod[timesteps])[:, None, None, None]
        sigma = jnp.sqrt(1 - alphas_cumprod[timesteps])[:, None, None, None]
        dropped = jax.random.uniform(keys[3], (count, 1)) < recipe.prompt_dropout
        embeds = nnx.merge(text_graph, params["text_encoder"])(jnp.where(dropped, empty, input_ids))
        unet = nnx.merge(unet_graph, params["unet"])
        velocity = unet(alpha * latents + sigma * noise, timesteps, embeds)
        return ((velocity - (alpha * noise - sigma * latents)) ** 2).mean()

    scaled = pool["latents"].astype(np.float32) * pool["scaling_factor"]

    def batches(step: int) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng([recipe.seed, 3, step])
        rows = rng.integers(0, len(scaled), recipe.unet_batch)
        wordings = rng.integers(0, WORDINGS, recipe.unet_batch)
        return jnp.asarray(scaled[rows]), jnp.asarray(pool["input_ids"][rows, wordings])

    step = make_step(loss_of, optimizer, ema=recipe.unet_ema)
    initial = start({"unet": unet_params, "text_encoder": text_params}, optimizer)
    state = train("unet", work, recipe, initial, step, batches, steps)
    ema = state["ema"]
    return nnx.merge(unet_graph, ema["unet"]), nnx.merge(text_graph, ema["text_encoder"])


def mean_of(one: Network, other: Network) -> Network:
    """The network halfway between two, the second of which was trained on from the first.

    Both lie in one basin, and halfway is often better than either (Wortsman et al. 2022, "Model soups").
    """
    graph, params = nnx.split(other)
    return nnx.merge(graph, jax.tree.map(lambda a, b: (a + b) / 2, nnx.state(one), params))


def text_config(tokenizer: Tokenizer) -> CLIPTextConfig:
    return CLIPTextConfig.from_json(TEXT_JSON | {"vocab_size": len(tokenizer.tokenizer)}, [])


# --- the loop that all stages share ----------------------------------------------------------------------------------


def adamw(learning_rate: float, steps: int, warmup: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-2))


def start(params: Any, optimizer: optax.GradientTransformation) -> State:
    return {"params": params, "ema": jax.tree.map(jnp.copy, params), "optimizer": optimizer.init(params)}


def make_step(
    loss_of: Callable[[Any, Any, jax.Array], jax.Array], optimizer: optax.GradientTransformation, ema: float
) -> Callable[[State, Any, jax.Array], tuple[State, jax.Array]]:
    def step(state: State, batch: Any, key: jax.Array) -> tuple[State, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(state["params"], batch, key)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        average = optax.incremental_update(params, state["ema"], 1 - ema)
        return {"params": params, "ema": average, "optimizer": optimizer_state}, loss

    return jax.jit(step, donate_argnums=0)


def train(
    stage: str,
    work: Path,
    recipe: Recipe,
    state: State,
    step: Callable[[State, Any, jax.Array], tuple[State, jax.Array]],
    batches: Callable[[int], Any],
    steps: int,
) -> State:
    """Runs from the stage's last checkpoint up to `steps`; batches and keys depend on the step's number alone."""
    file = work / f"{stage}.msgpack"
    done = 0
    if file.exists():
        restored = serialization.from_bytes({"done": 0, "state": pure(state)}, file.read_bytes())
        done, state = restored["done"], impure(state, restored["state"])
    if done:
        say(f"{STAGES[stage]}: {f'goes on after step {done} of {steps}' if done < steps else 'trained before'}")
    recent: list[jax.Array] = []
    loss_told, pace = "", 0.0
    with Progress() as progress, (work / f"{stage}.jsonl").open("a") as losses:
        for number in range(done, steps):
            key = jax.random.fold_in(jax.random.key(recipe.seed), number)
            state, loss = step(state, batches(number), key)
            recent.append(loss)
            if number == done:  # which compiled
                began = time.monotonic()
            else:
                pace = (time.monotonic() - began) / (number - done)
            if (number + 1) % 50 == 0 or number + 1 == steps:
                mean = float(np.mean(recent))
                recent.clear()
                losses.write(json.dumps({"step": number + 1, "loss": round(mean, 5), "seconds": round(pace, 4)}) + "\n")
                losses.flush()
                loss_told = f", loss {mean:.4f}"
                if not math.isfinite(mean):
                    raise Stop(f"{STAGES[stage]}: the loss is {mean} at step {number + 1}.")
            expected = f", {pace:.2f} s a step, {span(pace * (steps - number - 1))} left" if pace else ""
            progress.show({STAGES[stage]: ("training", f"step {number + 1} of {steps}{loss_told}{expected}")})
            if (number + 1) % recipe.checkpoint_steps == 0 or number + 1 == steps:
                partial = file.with_suffix(".partial")
                partial.write_bytes(serialization.to_bytes({"done": number + 1, "state": pure(state)}))
                os.replace(partial, file)
    return state


def hold(work: Path, recipe: Recipe, start_from: Path | None) -> None:
    """Raises Invalid where the checkpoints in `work` are another training's, which this one would go on with."""
    file = work / "recipe.json"
    ours = {**dataclasses.asdict(recipe), "start_from": start_from and str(start_from)}
    del ours["checkpoint_steps"]  # where it was saved, nothing else
    if file.exists():
        theirs = json.loads(file.read_text())
        differ = [f"{name} ({theirs.get(name)}, here {ours[name]})" for name in ours if theirs.get(name) != ours[name]]
        if differ:
            raise Invalid(f"--work: {work} is another training's, which differs in {', '.join(differ)}.")
    write_json(file, ours)


def pure(state: State) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def impure(state: State, leaves: Any) -> State:
    return jax.tree.unflatten(jax.tree.structure(state), [jnp.asarray(leaf) for leaf in leaves])


# --- the folder -------------------------------------------------------------------------------------------------------


def export(out: Path, vae: VAE, unet: UNet, text_encoder: CLIPText, scaling_factor: float) -> None:
    """Writes the networks in float16, in diffusers layout."""
    parts = {
        "vae": ("diffusion_pytorch_model", vae, VAE_JSON | {"scaling_factor": round(scaling_factor, 6)}),
        "unet": ("diffusion_pytorch_model", unet, UNET_JSON),
        "text_encoder": ("model", text_encoder, TEXT_JSON | {"vocab_size": text_encoder.config.vocab_size}),
    }
    for part, (stem, module, config) in parts.items():
        (out / part).mkdir(parents=True, exist_ok=True)
        write_json(out / part / "config.json", config)
        save_file(to_tensors(module, np.float16), out / part / f"{stem}.safetensors", {"format": "pt"})
    (out / "scheduler").mkdir(exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER_JSON)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", SCHEDULER_JSON["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(out / "model_index.json", index)


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer in which every word of the captions is one token; other text falls back to bytes."""
    from tokenizers import Tokenizer as Trainable
    from tokenizers import models, pre_tokenizers, trainers

    trainable = Trainable(models.BPE(end_of_word_suffix="</w>"))
    trainable.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=5000, end_of_word_suffix="</w>", show_progress=False)
    trainable.train_from_iterator(sorted(scenes.vocabulary()), trainer)
    merges = [" ".join(pair) for pair in json.loads(trainable.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    length = TEXT_JSON["max_position_embeddings"]
    config = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": length, **special}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)


def write_card(
    out: Path,
    work: Path,
    recipe: Recipe,
    networks: dict[str, nnx.Module],
    started_from: Path | None,
    averaged: bool,
) -> None:
    """The model card, with the curves of its losses. What `started_from`'s card says of its own training is kept."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    earlier = card_rows(started_from) if started_from else {}
    curves = {}
    for stage in STAGES:
        file = work / f"{stage}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        if lines:
            curves[stage] = {line["step"]: line for line in lines}  # a resumed run repeats a few: the last one counts
    if curves:
        figure, axes = pyplot.subplots(
            1, len(curves), figsize=(4 * len(curves), 3), layout="constrained", squeeze=False
        )
        for axis, stage in zip(axes[0], curves, strict=True):
            axis.semilogy(list(curves[stage]), [line["loss"] for line in curves[stage].values()])
            axis.set(title=STAGES[stage], xlabel="step", ylabel="loss")
            axis.grid(alpha=0.3, which="both")
        figure.savefig(out / "loss.png", dpi=100)

    def trained(stage: str, how: str) -> str:
        if stage not in curves:
            return earlier.get(STAGES[stage], "kept as it was")
        told = curves[stage]  # a line's pace is its run's so far
        minutes = sum((step - before) * told[step]["seconds"] for before, step in pairwise([0, *told])) / 60
        said = f"{max(curves[stage], default=0)} steps of {how}, {minutes:.0f} minutes"
        before = earlier.get(STAGES[stage])
        return f"{before}; then, from those weights: {said}" if before else said

    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))
        for name, network in networks.items()
    }
    rows = {
        "parameters": ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in sizes.items()),
        "pictures": f"128x128; latents 16x16x{VAE_JSON['latent_channels']}",
        "data": f"drawn by demo/scenes.py: {len(scenes.KINDS)} things, {len(scenes.COLOURS)} colours, "
        f"{len(scenes.BACKGROUNDS)} backgrounds, one or two things with a relation; about a tenth of the "
        "combinations is held out",
        STAGES["vae"]: trained("vae", f"{recipe.vae_batch} fresh pictures"),
        STAGES["text"]: trained("text", f"{recipe.text_batch} fresh captions, telling what is where"),
        STAGES["unet"]: trained(
            "unet",
            f"{recipe.unet_batch} latents out of a pool of {recipe.pool}, v-prediction, "
            f"{recipe.prompt_dropout:.0%} of prompts dropped{', and averaged with what it began from' * averaged}",
        ),
        STAGES["decoder"]: trained("decoder", f"{recipe.vae_batch} fresh pictures with the encoder fixed"),
        "machine": f"{os.cpu_count()} CPU cores, shared with other work",
        "licence": "Apache-2.0, weights and pictures; nothing was trained on anybody's work but the drawing program's",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    (out / "README.md").write_text(CARD.format(table=table), "utf-8")


def card_rows(folder: Path) -> dict[str, str]:
    """What a card of ours says, by the first column of its table."""
    file = folder / "README.md"
    cells = [line.strip("| ").split(" | ") for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    return {row[0]: row[1] for row in cells if len(row) == 2}


CARD = """# The demo model

A latent diffusion model small enough for a laptop's CPU and this repository: simple scenes from captions such as
"a red house under a yellow sun at dusk". It exists to show the server at work and to test it, in the same layout
and on the same code path as Stable Diffusion; it knows no other words than those of its captions.

| what | how |
|---|---|
{table}

![The losses of the trainings](loss.png)

Made by `python -m demo.train` (`make train-demo`), whose options are the recipe; where the table tells of more
than one leg, the later ones began with `--start-from`, from the weights of those before.
`make demo-quality` measures it on captions from the held-out combinations and prints the table that the project's
README shows.
"""


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    run(main)
