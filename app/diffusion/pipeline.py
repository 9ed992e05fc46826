"""The device: `encode`, `insert`, `step` and `decode` as compiled programs over a `DenoiseState`.

Knows nothing of queues, requests, Ray or HTTP. Every shape is declared at load; `warmup` loads or compiles all of them,
runs each and times it. On several chips the state and the weights stand on every one, and the rows of a step are
divided among them.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from app.aot.cache_key import fingerprint
from app.aot.libtpu_flags import set_flags
from app.aot.program import Program, compiled
from app.aot.store import first_line
from app.diffusion.models.loading import Checkpoint, load_checkpoint
from app.diffusion.models.tokenizer import Tokenizer
from app.diffusion.samplers import (
    HISTORY,
    Coefficients,
    SamplerTable,
    Schedule,
    default_sampler,
    make_table,
    samplers_for,
    update,
)
from app.types import ActiveSlot, InvalidField, PipelineSpec, Size

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ENCODE_TEXTS = 4  # most texts in one dispatch of the text encoder
# So many rows of a chip go through a network together. More gain nothing: these fill a TPU's matrix units, and what
# lies between two operations stays in its VMEM only as long as it is small. Fewer take nearly as long as these, so
# their images are cut into strips until they are as many.
ROWS_TOGETHER = {"tpu": 8}
TIMED_RUNS, TIMED_S = 3, 2.0  # at warm-up each program runs so often, or for about so long
PREVIEW_STEPS, PREVIEW_S = 10, 2.0  # most steps of the pictures that previews learn their colours from, and their time


class DenoiseState(NamedTuple):
    """S slots of one size; a slot is all that a picture in the making is."""

    latents: jax.Array  # float32 [S, h, w, C], variance-preserving
    history: jax.Array  # float32 [S, HISTORY - 1, h, w, C], newest first
    prompt_embeds: jax.Array  # [S, 2, T, D]: unconditional, conditional
    guidance_scale: jax.Array  # float32 [S]
    seed: jax.Array  # uint32 [S]
    step: jax.Array  # int32 [S], the next row of the slot's table
    timesteps: jax.Array  # float32 [S, N]
    preview: jax.Array  # float32 [S, N, 2]
    table: Coefficients  # p, q, a, n float32 [S, N]; b float32 [S, N, HISTORY]


class Rows(NamedTuple):
    """Which slots share a step, and which rows the UNet sees for them. R rows hold at most R active."""

    slots: np.ndarray  # int32 [R], a lane's slot; padded with a number that no slot has
    lane: np.ndarray  # int32 [R], a row's lane
    half: np.ndarray  # int32 [R], 0: unconditional, 1: conditional
    uncond: np.ndarray  # int32 [R], a lane's row with its unconditional output
    cond: np.ndarray  # int32 [R], likewise; the same row where there is no guidance


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A text behind the text encoder, [T, D], and whether it was too long for it."""

    embeds: jax.Array
    truncated: bool


class Pipeline:
    """One checkpoint on the device, and the four verbs that the engine sees.

    Every verb only dispatches; `wait`, and `np.asarray` of decoded pixels, block.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        spec: PipelineSpec,
        *,
        devices: Sequence[jax.Device] | None = None,
    ):
        self.schedule = Schedule.from_config(checkpoint.scheduler)
        self.samplers = samplers_for(self.schedule)
        self.default_sampler = default_sampler(self.schedule)
        self.tokenizer = tokenizer
        self.sizes = spec.sizes
        self.row_buckets = spec.row_buckets
        self.decode_buckets = spec.decode_buckets
        self.num_slots = spec.num_slots
        self.max_steps = spec.max_steps
        self.table_rows = spec.max_steps + 1  # pndm evaluates once more than it has steps
        self.latent_channels = checkpoint.vae.config.latent_channels
        self.scale_factor = checkpoint.vae.config.scale_factor
        check_sizes(self.sizes, self.scale_factor * checkpoint.unet.config.scale_factor)
        self.step_s: dict[tuple[Size, int], float] = {}  # seconds of a step by size and row bucket; `warmup` measures
        self.decode_s: dict[tuple[Size, int], float] = {}

        self.mesh = mesh_of(jax.local_devices() if devices is None else devices)
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())
        self.dtype = checkpoint.unet.dtype
        self.embeds_shape = (tokenizer.length, checkpoint.text_encoder.config.hidden_size)
        networks = {"unet": checkpoint.unet, "vae": checkpoint.vae, "text_encoder": checkpoint.text_encoder}
        graphs, params = {}, {}
        for name, network in networks.items():
            graph, variables = nnx.split(network)
            # Plain arrays, which go into a dispatch faster than Flax's variables do.
            params[name], tree = jax.tree.flatten(variables)
            graphs[name] = partial(network_of, graph, tree)
        self.params = placed(params, self.everywhere)
        self.preview_maps = {size: np.zeros((self.latent_channels + 1, 3), np.float32) for size in self.sizes}
        self.programs = self.declare(graphs)
        self.folder = spec.programs
        self.run: Mapping[str, Callable[..., Any]] = {}

    @classmethod
    def load(cls, spec: PipelineSpec, *, devices: Sequence[jax.Device] | None = None) -> "Pipeline":
        """Raises ValueError that lists all problems of the checkpoint, or names the size that it cannot have.

        `devices` defaults to all of this host.
        """
        set_flags()
        checkpoint = load_checkpoint(spec.model, revision=spec.revision, dtype=DTYPES[spec.dtype])
        length = checkpoint.text_encoder.config.max_position_embeddings
        tokenizer = Tokenizer(checkpoint.folder / "tokenizer", length)
        return cls(checkpoint, tokenizer, spec, devices=devices)

    # The four verbs

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Each text by itself, several to a dispatch: what a text becomes never depends on its neighbours."""
        tokens = self.tokenizer(list(texts))
        embeds: list[jax.Array] = []
        for first in range(0, len(texts), ENCODE_TEXTS):
            ids = tokens.input_ids[first : first + ENCODE_TEXTS]
            padded = np.zeros((ENCODE_TEXTS, self.tokenizer.length), np.int32)
            padded[: len(ids)] = ids
            embeds += self.run["encode"](self.params["text_encoder"], padded, np.int32(len(ids)))[: len(ids)]
        return [Encoded(*one) for one in zip(embeds, tokens.truncated, strict=True)]

    def insert(
        self,
        state: DenoiseState,
        slot: int,
        prompt: Encoded,
        negative_prompt: Encoded,
        table: SamplerTable,
        guidance_scale: float,
        seed: int,
    ) -> DenoiseState:
        """Puts a request's picture into a slot, as noise that its seed alone decides. The given state is consumed."""
        return self.run[f"insert {self.size_of(state)}"](
            state,
            np.int32(slot),
            negative_prompt.embeds,
            prompt.embeds,
            np.float32(guidance_scale),
            np.uint32(seed),
            np.float32(table.initial_scale),
            self._padded(table.timesteps),
            self._padded(table.preview),
            Coefficients(*(self._padded(getattr(table, name)) for name in Coefficients._fields)),
        )

    def step(self, state: DenoiseState, active: Sequence[ActiveSlot], count: int = 1) -> tuple[DenoiseState, jax.Array]:
        """Denoises these slots by `count` steps, none beyond the end of its table, in the smallest bucket that holds
        their rows. The given state is consumed; `wait` takes the second result."""
        rows = rows_of(active, self.row_buckets, self.num_slots)
        program = self.run[f"step {self.size_of(state)} rows {len(rows.slots)}"]
        return program(self.params["unet"], state, rows, np.int32(count))

    def decode(self, state: DenoiseState, slots: Sequence[int]) -> jax.Array:
        """The slots' images: uint8 [bucket, H, W, 3], in the order of `slots`; rows past `len(slots)` are anything."""
        size = self.size_of(state)
        bucket = next(bucket for bucket in self.decode_buckets if bucket >= len(slots))
        padded = np.array([*slots, *[self.num_slots] * (bucket - len(slots))], np.int32)
        return self.run[f"decode {size} images {bucket}"](self.params["vae"], state.latents, padded)

    def preview(self, state: DenoiseState, slot: int) -> jax.Array:
        """An unfinished image as its last step saw it, by a linear map instead of the VAE: uint8 [1, H, W, 3]."""
        program = self.run[f"preview {self.size_of(state)}"]
        at = (state.latents, state.history, state.preview, state.step)
        return program(self.preview_maps[self._pixels(state)], *at, np.int32(slot))

    def wait(self, done: jax.Array) -> None:
        """Blocks until the step that returned `done` has run. Raises what it failed with."""
        done.block_until_ready()

    # What surrounds them

    def empty_state(self, size: Size) -> DenoiseState:
        """Free slots of one of the declared sizes."""
        empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._state_shapes(size))
        return jax.device_put(empty, self.everywhere)

    def table(self, sampler: str | None, num_inference_steps: int) -> SamplerTable:
        """Raises InvalidField where the sampler, or so many steps of it, does not suit this checkpoint."""
        if num_inference_steps > self.max_steps:
            message = f"num_inference_steps must be between 1 and {self.max_steps}, got {num_inference_steps}."
            raise InvalidField("num_inference_steps", message)
        return make_table(sampler or self.default_sampler, num_inference_steps, self.schedule)

    def declare(self, graphs: Mapping[str, Any]) -> tuple[Program, ...]:
        """Every program that will ever run, with the shapes that it takes."""

        def shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self.everywhere)

        def program(name: str, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Program:
            return Program(name, function, arguments, donate, out_shardings=self.everywhere)

        params = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), self.params)
        number, real, rows = shape(dtype=jnp.int32), shape(), self.table_rows
        embeds = shape(*self.embeds_shape, dtype=self.dtype)
        programs = [
            program(
                "encode",
                partial(encode_program, graphs["text_encoder"]),
                params["text_encoder"],
                shape(ENCODE_TEXTS, self.tokenizer.length, dtype=jnp.int32),
                number,
            )
        ]
        for size in self.sizes:
            label = f"{size[0]}x{size[1]}"
            state = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), self._state_shapes(size))
            coefficients = Coefficients(**{name: shape(rows) for name in "pqan"}, b=shape(rows, HISTORY))
            inserted = [number, embeds, embeds, real, shape(dtype=jnp.uint32), real, shape(rows), shape(rows, 2)]
            programs.append(program(f"insert {label}", insert_program, state, *inserted, coefficients, donate=(0,)))
            for bucket in self.row_buckets:
                step = partial(step_program, graphs["unet"], row_sharding(self.mesh, bucket))
                taken: Any = [shape(bucket, dtype=jnp.int32)] * len(Rows._fields)
                arguments = (params["unet"], state, Rows(*taken), number)
                programs.append(program(f"step {label} rows {bucket}", step, *arguments, donate=(1,)))
            for bucket in self.decode_buckets:
                decode = partial(decode_program, graphs["vae"], row_sharding(self.mesh, bucket))
                slots = shape(bucket, dtype=jnp.int32)
                programs.append(program(f"decode {label} images {bucket}", decode, params["vae"], state.latents, slots))
            seen = (shape(self.latent_channels + 1, 3), state.latents, state.history, state.preview, state.step, number)
            programs.append(program(f"preview {label}", partial(preview_program, size), *seen))
        return tuple(programs)

    def warmup(self) -> None:
        """Loads or compiles every declared program, runs each, and times those that the engine plans with."""
        facts = fingerprint(self.mesh.devices.flat)
        self.run = compiled(self.programs, folder=self.folder, fingerprint=facts)
        try:
            self.measure()
        except jax.errors.JaxRuntimeError as error:
            if self.folder is None:
                raise
            logger.warning("A program failed at its first run, so all are compiled anew: %s", first_line(error))
            self.run = compiled(self.programs, folder=None, fingerprint=facts)
            self.measure()

    def measure(self) -> None:
        """Runs every program and keeps the times that the engine plans with."""
        (text,) = self.encode(["warm-up"])
        for size in self.sizes:
            self.measure_size(size, text)
            steps = ", ".join(f"{rows}: {1e3 * self.step_s[size, rows]:.1f}" for rows in self.row_buckets)
            logger.info("warm %dx%d ms a step by rows: %s", *size, steps)

    def measure_size(self, size: Size, text: Encoded) -> None:
        state, table = self.empty_state(size), self.table(None, 1)
        for slot in range(self.num_slots):
            state = self.insert(state, slot, text, text, table, 1.0, slot)

        def one_step(rows: int) -> jax.Array:
            nonlocal state
            active = [ActiveSlot(slot, True) for slot in range(rows // 2)] + [ActiveSlot(rows // 2, False)] * (rows % 2)
            state, done = self.step(state, active)
            return done

        def one_decode(images: int) -> jax.Array:
            return self.decode(state, range(images))

        self.step_s |= {(size, rows): seconds for rows, seconds in timed(one_step, self.row_buckets).items()}
        self.decode_s |= {(size, images): seconds for images, seconds in timed(one_decode, self.decode_buckets).items()}
        self.preview_maps[size] = self.fit_preview_map(size, text)
        jax.block_until_ready(self.preview(state, 0))

    def fit_preview_map(self, size: Size, text: Encoded) -> np.ndarray:
        """[C + 1, 3]: the linear map from scaled latents, and a one, to colours in [-1, 1] that comes closest to what
        this VAE makes of a few pictures."""
        count = self.decode_buckets[-1]
        active = [ActiveSlot(slot, False) for slot in range(count)]
        step_s = self.step_s[size, next(rows for rows in self.row_buckets if rows >= count)]
        table = self.table(None, max(1, min(PREVIEW_STEPS, self.max_steps, int(PREVIEW_S / step_s))))
        state = self.empty_state(size)
        for slot in range(count):
            state = self.insert(state, slot, text, text, table, 1.0, slot)
        state, _ = self.step(state, active, len(table))
        pixels = np.asarray(self.decode(state, range(count))).astype(np.float32) / 127.5 - 1
        latents = np.asarray(state.latents)[:count]
        h, w, channels = latents.shape[1:]
        blocks = pixels.reshape(count, h, self.scale_factor, w, self.scale_factor, 3).mean(axis=(2, 4))
        inputs = np.concatenate([latents, np.ones((count, h, w, 1), np.float32)], axis=-1)
        return np.asarray(np.linalg.lstsq(inputs.reshape(-1, channels + 1), blocks.reshape(-1, 3))[0], np.float32)

    def size_of(self, state: DenoiseState) -> str:
        width, height = self._pixels(state)
        return f"{width}x{height}"

    def _pixels(self, state: DenoiseState) -> Size:
        height, width = state.latents.shape[1:3]
        return width * self.scale_factor, height * self.scale_factor

    def _state_shapes(self, size: Size) -> DenoiseState:
        """A DenoiseState of jax.ShapeDtypeStruct."""
        width, height = size
        slots, rows = self.num_slots, self.table_rows
        latents = (height // self.scale_factor, width // self.scale_factor, self.latent_channels)

        def shape(*shape: int, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct((slots, *shape), dtype)

        return DenoiseState(
            latents=shape(*latents),
            history=shape(HISTORY - 1, *latents),
            prompt_embeds=shape(2, *self.embeds_shape, dtype=self.dtype),
            guidance_scale=shape(),
            seed=shape(dtype=jnp.uint32),
            step=shape(dtype=jnp.int32),
            timesteps=shape(rows),
            preview=shape(rows, 2),
            table=Coefficients(**{name: shape(rows) for name in "pqan"}, b=shape(rows, HISTORY)),
        )

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        padded = np.zeros((self.table_rows, *rows.shape[1:]), np.float32)
        padded[: len(rows)] = rows
        return padded


def network_of(graph: Any, tree: Any, params: Sequence[jax.Array]) -> Any:
    return nnx.merge(graph, jax.tree.unflatten(tree, params))


def encode_program(text_encoder: Any, params: Any, input_ids: jax.Array, count: jax.Array) -> list[jax.Array]:
    """The first `count` texts, one after the other, so that padding costs nothing and neighbours change no bit."""
    module = text_encoder(params)
    one = jax.eval_shape(module, input_ids[:1])

    def encode(i: jax.Array, embeds: jax.Array) -> jax.Array:
        ids = jax.lax.dynamic_slice_in_dim(input_ids, i, 1)
        return jax.lax.dynamic_update_slice_in_dim(embeds, module(ids), i, axis=0)

    embeds = jax.lax.fori_loop(0, count, encode, jnp.zeros((len(input_ids), *one.shape[1:]), one.dtype))
    return list(embeds)


def insert_program(
    state: DenoiseState,
    slot: jax.Array,
    uncond_embeds: jax.Array,
    cond_embeds: jax.Array,
    guidance_scale: jax.Array,
    seed: jax.Array,
    initial_scale: jax.Array,
    timesteps: jax.Array,
    preview: jax.Array,
    table: Coefficients,
) -> DenoiseState:
    noise = slot_noise(seed, jnp.int32(0), state.latents.shape[1:])
    filled = DenoiseState(
        latents=initial_scale * noise,
        history=jnp.zeros(state.history.shape[1:]),
        prompt_embeds=jnp.stack([uncond_embeds, cond_embeds]),
        # As in diffusers, a scale of 1 or less means no guidance.
        guidance_scale=jnp.maximum(guidance_scale, 1.0),
        seed=seed,
        step=jnp.int32(0),
        timesteps=timesteps,
        preview=preview,
        table=table,
    )
    return jax.tree.map(lambda slots, value: slots.at[slot].set(value.astype(slots.dtype)), state, filled)


def step_program(
    unet: Any, sharding: NamedSharding, params: Any, state: DenoiseState, rows: Rows, count: jax.Array
) -> tuple[DenoiseState, jax.Array]:
    """Gathers the active, runs the UNet over their rows and applies the tables, `count` times; then scatters."""
    active: DenoiseState = jax.tree.map(lambda x: x.at[rows.slots].get(mode="clip"), state)
    numbers = jnp.arange(len(rows.slots))
    embeds = active.prompt_embeds[rows.lane, rows.half]
    predict = divided(partial(predict_noise, unet, together_on(sharding)), sharding)
    whole = partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(sharding.mesh, PartitionSpec()))

    def step(_: jax.Array, moving: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        latents, history, at = moving
        timesteps = active.timesteps[numbers, at]
        noise_pred = whole(predict(params, latents[rows.lane], timesteps[rows.lane], embeds))
        uncond, cond = noise_pred[rows.uncond], noise_pred[rows.cond]
        noise_pred = uncond + active.guidance_scale[:, None, None, None] * (cond - uncond)
        fresh = jax.vmap(partial(slot_noise, shape=latents.shape[1:]))(active.seed, at + 1)
        coefficients = jax.tree.map(lambda x: x[numbers, at], active.table)
        latents, history = update(latents, noise_pred, history, fresh, coefficients)
        return latents, history, at + 1

    latents, history, at = jax.lax.fori_loop(0, count, step, (active.latents, active.history, active.step))
    moved = state._replace(
        latents=state.latents.at[rows.slots].set(latents, mode="drop"),
        history=state.history.at[rows.slots].set(history, mode="drop"),
        step=state.step.at[rows.slots].set(at, mode="drop"),
    )
    return moved, at[0]


def predict_noise(
    unet: Any, together: int | None, params: Any, latents: jax.Array, timesteps: jax.Array, prompt_embeds: jax.Array
) -> jax.Array:
    """The UNet over one chip's rows, so many together, one part of them after the other."""
    module, (rows, height) = unet(params), latents.shape[:2]
    passes = passes_of(rows, together)
    coarsest = height // module.config.scale_factor
    predict = partial(module, strips=strips_of(rows // passes, coarsest, together))
    if passes == 1:
        noise_pred = predict(latents, timesteps, prompt_embeds)
    else:
        parts = [x.reshape(passes, -1, *x.shape[1:]) for x in (latents, timesteps, prompt_embeds)]
        noise_pred = jax.lax.map(lambda part: predict(*part), tuple(parts)).reshape(latents.shape)
    return noise_pred.astype(jnp.float32)


def together_on(sharding: NamedSharding) -> int | None:
    return ROWS_TOGETHER.get(sharding.mesh.devices.flat[0].platform)


def passes_of(rows: int, together: int | None) -> int:
    """In how many equal parts so many rows go through the UNet."""
    return rows // together if together and rows % together == 0 else 1


def strips_of(rows: int, height: int, together: int | None) -> int:
    """Into how many strips the images of so many rows are cut; each level of the network must divide by it."""
    strips = 1
    while together and 2 * strips * rows <= together and height % (2 * strips) == 0:
        strips *= 2
    return strips


def divided(function: Callable[..., jax.Array], sharding: NamedSharding) -> Callable[..., jax.Array]:
    """`function` of parameters and arrays of rows, each chip at its own rows, with nothing to say to the others."""
    if sharding.is_fully_replicated:
        return function

    def call(params: Any, *rows: jax.Array) -> jax.Array:
        specs = (PartitionSpec(), *[sharding.spec] * len(rows))
        # Its check knows no `platform_dependent`.
        each = jax.shard_map(function, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec, check_vma=False)
        return each(params, *rows)

    return call


def decode_program(vae: Any, sharding: NamedSharding, params: Any, latents: jax.Array, slots: jax.Array) -> jax.Array:
    decode = divided(partial(decode_rows, vae, together_on(sharding)), sharding)
    return decode(params, latents.at[slots].get(mode="clip"))


def decode_rows(vae: Any, together: int | None, params: Any, latents: jax.Array) -> jax.Array:
    """Where strips fill a chip, one image after the other: what lies between two operations is smallest so."""
    decode = partial(vae(params).decode, strips=strips_of(1, latents.shape[1], together))
    if together is None or len(latents) == 1:
        return as_pixels(decode(latents))
    return jax.lax.map(lambda one: as_pixels(decode(one[None])[0]), latents)


def preview_program(
    size: Size,
    preview_map: jax.Array,
    latents: jax.Array,
    history: jax.Array,
    preview: jax.Array,
    step: jax.Array,
    slot: jax.Array,
) -> jax.Array:
    weights = preview[slot, jnp.maximum(step[slot] - 1, 0)]
    denoised = weights[0] * latents[slot] + weights[1] * history[slot, 0]  # [h, w, C]
    colours = denoised @ preview_map[:-1] + preview_map[None, None, -1]
    return as_pixels(jax.image.resize(colours, (size[1], size[0], 3), "linear"))[None]


def as_pixels(colours: jax.Array) -> jax.Array:
    """Around [-1, 1] -> uint8."""
    return jnp.round(jnp.clip(colours.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)


def slot_noise(seed: jax.Array, number: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise that depends on the seed and the step's number alone: not on slot, bucket or neighbours."""
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), shape)


def rows_of(active: Sequence[ActiveSlot], buckets: Sequence[int], nobody: int) -> Rows:
    """The rows of these active in the smallest bucket that holds them; a lane's two rows stand side by side."""
    used = sum(lane.rows for lane in active)
    bucket = next(bucket for bucket in buckets if bucket >= used)
    rows = Rows(np.full(bucket, nobody, np.int32), *(np.zeros(bucket, np.int32) for _ in range(4)))
    row = 0
    for number, lane in enumerate(active):
        rows.slots[number] = lane.slot
        rows.uncond[number], rows.cond[number] = row, row + lane.guided
        rows.lane[row : row + lane.rows] = number
        rows.half[row : row + lane.rows] = [0, 1] if lane.guided else [1]
        row += lane.rows
    return rows


def placed(params: Any, sharding: NamedSharding) -> Any:
    """Weights on the devices; what is a shape only, to be compiled for and never run (capacity/programs.py), stays
    one."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        return params
    return jax.device_put(params, sharding)


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """The devices, or as many of them as are a power of two, along axes of two each: so that any number of rows which
    is a power of two can be divided among them, fewer than there are devices too."""
    halvings = len(devices).bit_length() - 1
    shape = [2] * halvings or [1]
    return Mesh(np.array(devices[: 2**halvings]).reshape(shape), [f"data{i}" for i in range(len(shape))])


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Rows over as many devices as divide them."""
    halvings = next(n for n in range(len(mesh.axis_names), -1, -1) if rows % 2**n == 0)
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names[:halvings] or None))


def timed(dispatch: Callable[[int], jax.Array], buckets: Sequence[int]) -> dict[int, float]:
    """Seconds of each bucket's quickest run of a few, after one that does not count. They take turns, so that what else
    the machine has to do for a while does not make one of them look slow beside the others."""
    for bucket in buckets:
        jax.block_until_ready(dispatch(bucket))
    seconds = dict.fromkeys(buckets, math.inf)
    began = time.perf_counter()
    for _ in range(TIMED_RUNS):
        for bucket in buckets:
            started = time.perf_counter()
            jax.block_until_ready(dispatch(bucket))
            seconds[bucket] = min(seconds[bucket], time.perf_counter() - started)
        if time.perf_counter() - began > TIMED_S * len(buckets):
            break
    return seconds


def check_sizes(sizes: Sequence[Size], multiple: int) -> None:
    for width, height in sizes:
        if width % multiple or height % multiple or not (width and height):
            raise ValueError(
                f"sizes must have a width and a height that are multiples of {multiple} for this checkpoint, "
                f"got {width}x{height}."
            )
