"""The device: `encode`, `insert`, `step` and `decode` as compiled programs over a `DenoiseState`.

Knows nothing of queues, requests, Ray or HTTP. Every shape is declared at load; `warmup` compiles and runs all of them.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from app.models.loading import Checkpoint, load_checkpoint
from app.models.tokenizer import Tokenizer
from app.samplers import (
    HISTORY,
    Coefficients,
    SamplerTable,
    Schedule,
    default_sampler,
    make_table,
    samplers_for,
    update,
)

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
Size = tuple[int, int]  # width and height, in pixels


class DenoiseState(NamedTuple):
    """S slots of one size; a slot is all that a picture in the making is."""

    latents: jax.Array  # float32 [S, h, w, C], variance-preserving
    history: jax.Array  # float32 [S, HISTORY - 1, h, w, C], newest first
    prompt_embeds: jax.Array  # [S, 2, T, D]: unconditional, conditional
    guidance_scale: jax.Array  # float32 [S]
    seed: jax.Array  # uint32 [S]
    step: jax.Array  # int32 [S], the next row of the slot's table
    timesteps: jax.Array  # float32 [S, N]
    table: Coefficients  # p, q, a, n float32 [S, N]; b float32 [S, N, HISTORY]


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """A prompt and its negative prompt, encoded: prompt_embeds [2, T, D], unconditional first."""

    prompt_embeds: jax.Array
    prompt_truncated: bool
    negative_prompt_truncated: bool


class Pipeline:
    """One checkpoint on the device, and the four verbs that the engine sees."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        *,
        sizes: Sequence[Size],
        batch_buckets: Sequence[int],
        max_steps: int,
    ):
        self.schedule = Schedule.from_config(checkpoint.scheduler)
        self.samplers = samplers_for(self.schedule)
        self.default_sampler = default_sampler(self.schedule)
        self.tokenizer = tokenizer
        self.sizes = tuple(sizes)
        self.batch_buckets = tuple(sorted(set(batch_buckets)))
        self.num_slots = self.batch_buckets[-1]
        self.max_steps = max_steps
        self.rows = max_steps + 1  # pndm evaluates once more than it has steps
        self.latent_channels = checkpoint.vae.config.latent_channels
        self.scale_factor = checkpoint.vae.config.scale_factor
        check_sizes(self.sizes, self.scale_factor * 2 ** (len(checkpoint.unet.config.block_out_channels) - 1))

        unet, self.unet = nnx.split(checkpoint.unet)
        vae, self.vae = nnx.split(checkpoint.vae)
        text_encoder, self.text_encoder = nnx.split(checkpoint.text_encoder)
        self.dtype = checkpoint.unet.dtype
        self.embeds_shape = (tokenizer.length, checkpoint.text_encoder.config.hidden_size)
        self._encode = jax.jit(partial(encode_program, text_encoder))
        self._insert = jax.jit(insert_program, donate_argnums=0)
        self._step = jax.jit(partial(step_program, unet), donate_argnums=1)
        self._decode = jax.jit(partial(decode_program, vae))

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        sizes: Sequence[Size],
        batch_buckets: Sequence[int],
        max_steps: int,
    ) -> "Pipeline":
        """Raises ValueError that lists all that is wrong with the checkpoint, or names the size that does not fit."""
        checkpoint = load_checkpoint(model, revision=revision, dtype=DTYPES[dtype])
        length = checkpoint.text_encoder.config.max_position_embeddings
        tokenizer = Tokenizer(checkpoint.folder / "tokenizer", length)
        return cls(checkpoint, tokenizer, sizes=sizes, batch_buckets=batch_buckets, max_steps=max_steps)

    # The four verbs

    def encode(self, prompt: str, negative_prompt: str = "") -> Embeddings:
        tokens = self.tokenizer([negative_prompt, prompt])
        embeds = self._encode(self.text_encoder, tokens.input_ids)
        return Embeddings(embeds, tokens.truncated[1], tokens.truncated[0])

    def insert(
        self,
        state: DenoiseState,
        slot: int,
        embeddings: Embeddings,
        table: SamplerTable,
        guidance_scale: float,
        seed: int,
    ) -> DenoiseState:
        """Puts a request's picture into a slot, as noise that its seed alone decides. The given state is consumed."""
        coefficients = Coefficients(*(self._padded(getattr(table, name)) for name in Coefficients._fields))
        return self._insert(
            state,
            np.int32(slot),
            embeddings.prompt_embeds,
            np.float32(guidance_scale),
            np.uint32(seed),
            np.float32(table.initial_scale),
            self._padded(table.timesteps),
            coefficients,
        )

    def step(self, state: DenoiseState, slots: Sequence[int]) -> DenoiseState:
        """Denoises these slots by one step, in the smallest bucket that holds them. The given state is consumed."""
        return self._step(self.unet, state, self._bucket(slots))

    def decode(self, state: DenoiseState, slots: Sequence[int]) -> jax.Array:
        """The slots' pictures: uint8 [bucket, H, W, 3], in the order of `slots`; rows past `len(slots)` are noise."""
        return self._decode(self.vae, state.latents, self._bucket(slots))

    # What surrounds them

    def empty_state(self, size: Size) -> DenoiseState:
        """Free slots of one of the declared sizes."""
        width, height = size
        slots, rows = self.num_slots, self.rows
        latents = (height // self.scale_factor, width // self.scale_factor, self.latent_channels)
        return DenoiseState(
            latents=jnp.zeros((slots, *latents), jnp.float32),
            history=jnp.zeros((slots, HISTORY - 1, *latents), jnp.float32),
            prompt_embeds=jnp.zeros((slots, 2, *self.embeds_shape), self.dtype),
            guidance_scale=jnp.ones(slots, jnp.float32),
            seed=jnp.zeros(slots, jnp.uint32),
            step=jnp.zeros(slots, jnp.int32),
            timesteps=jnp.zeros((slots, rows), jnp.float32),
            table=Coefficients(
                **{name: jnp.zeros((slots, rows), jnp.float32) for name in "pqan"},
                b=jnp.zeros((slots, rows, HISTORY), jnp.float32),
            ),
        )

    def table(self, sampler: str | None, num_inference_steps: int) -> SamplerTable:
        """Raises ValueError where the sampler, or so many steps of it, does not suit this checkpoint."""
        if num_inference_steps > self.max_steps:
            raise ValueError(f"num_inference_steps must be between 1 and {self.max_steps}, got {num_inference_steps}.")
        return make_table(sampler or self.default_sampler, num_inference_steps, self.schedule)

    def warmup(self) -> None:
        """Compiles and runs every declared program, with a log line for each."""
        began = time.perf_counter()

        def note(what: str) -> None:
            nonlocal began
            logger.info("warm %s in %.1f s", what, time.perf_counter() - began)
            began = time.perf_counter()

        embeddings = self.encode("warm-up")
        note("encode")
        for size in self.sizes:
            for bucket in self.batch_buckets:
                state = self.insert(self.empty_state(size), 0, embeddings, self.table(None, 1), 1.0, 0)
                slots = range(bucket)
                jax.block_until_ready(self.decode(self.step(state, slots), slots))
                note(f"{size[0]}x{size[1]} bucket {bucket}")

    def _bucket(self, slots: Sequence[int]) -> np.ndarray:
        """Slot numbers, padded to a declared bucket with a number that no slot has."""
        bucket = next(bucket for bucket in self.batch_buckets if bucket >= len(slots))
        return np.array([*slots, *[self.num_slots] * (bucket - len(slots))], np.int32)

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        padded = np.zeros((self.rows, *rows.shape[1:]), np.float32)
        padded[: len(rows)] = rows
        return padded


def encode_program(text_encoder: Any, params: Any, input_ids: jax.Array) -> jax.Array:
    return nnx.merge(text_encoder, params)(input_ids)


def insert_program(
    state: DenoiseState,
    slot: jax.Array,
    prompt_embeds: jax.Array,
    guidance_scale: jax.Array,
    seed: jax.Array,
    initial_scale: jax.Array,
    timesteps: jax.Array,
    table: Coefficients,
) -> DenoiseState:
    noise = slot_noise(seed, jnp.int32(0), state.latents.shape[1:])
    filled = DenoiseState(
        latents=initial_scale * noise,
        history=jnp.zeros(state.history.shape[1:]),
        prompt_embeds=prompt_embeds,
        # As in diffusers, a scale of 1 or less means no guidance.
        guidance_scale=jnp.maximum(guidance_scale, 1.0),
        seed=seed,
        step=jnp.int32(0),
        timesteps=timesteps,
        table=table,
    )
    return jax.tree.map(lambda slots, value: slots.at[slot].set(value.astype(slots.dtype)), state, filled)


def step_program(unet: Any, params: Any, state: DenoiseState, slots: jax.Array) -> DenoiseState:
    """Gathers the rows of `slots`, runs the UNet once over both halves of guidance, applies the tables, scatters."""
    rows: DenoiseState = jax.tree.map(lambda x: x.at[slots].get(mode="clip"), state)
    at = rows.step
    coefficients = jax.tree.map(lambda x: x[jnp.arange(len(slots)), at], rows.table)
    timesteps = rows.timesteps[jnp.arange(len(slots)), at]

    # The two rows of a picture stand side by side, so that a mesh splits pictures before it splits guidance.
    twice = partial(jnp.repeat, repeats=2, axis=0)
    embeds = rows.prompt_embeds.reshape(-1, *rows.prompt_embeds.shape[2:])
    noise_pred = nnx.merge(unet, params)(twice(rows.latents), twice(timesteps), embeds).astype(jnp.float32)
    noise_pred = noise_pred.reshape(len(slots), 2, *rows.latents.shape[1:])
    uncond, cond = noise_pred[:, 0], noise_pred[:, 1]
    noise_pred = uncond + rows.guidance_scale[:, None, None, None] * (cond - uncond)

    fresh = jax.vmap(partial(slot_noise, shape=rows.latents.shape[1:]))(rows.seed, at + 1)
    latents, history = update(rows.latents, noise_pred, rows.history, fresh, coefficients)
    return state._replace(
        latents=state.latents.at[slots].set(latents, mode="drop"),
        history=state.history.at[slots].set(history, mode="drop"),
        step=state.step.at[slots].set(at + 1, mode="drop"),
    )


def decode_program(vae: Any, params: Any, latents: jax.Array, slots: jax.Array) -> jax.Array:
    pixels = nnx.merge(vae, params).decode(latents.at[slots].get(mode="clip")).astype(jnp.float32)
    return jnp.round(jnp.clip(pixels / 2 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)


def slot_noise(seed: jax.Array, number: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise that depends on the seed and the step's number alone: not on slot, bucket or neighbours."""
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), shape)


def check_sizes(sizes: Sequence[Size], multiple: int) -> None:
    for width, height in sizes:
        if width % multiple or height % multiple or not (width and height):
            raise ValueError(
                f"sizes must have a width and a height that are multiples of {multiple} for this checkpoint, "
                f"got {width}x{height}."
            )
