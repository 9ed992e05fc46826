"""What runs on the device: pure functions over a `DenoiseState`, which are compiled once per shape.

Knows nothing of requests and queues, nor of how programs are declared, compiled and kept.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from app.diffusion.edit_programs import OUTSIDE_POSTERIOR, POSTERIOR, EditInputs, EditState, blended, started
from app.diffusion.families.family import OUTSIDE, REFERENCES, Family, Networks
from app.diffusion.models.image_shards import ImageShards
from app.diffusion.models.strips import Strips
from app.diffusion.networks import modules_of
from app.diffusion.samplers.table import Coefficients, update
from app.diffusion.sharding import divided, image_shards, passes_of, rows_at, strips_of, together_on
from app.types import ActiveSlot, Size


class DenoiseState(NamedTuple):
    """S slots of one size. A slot holds everything that an unfinished image depends on."""

    latents: jax.Array  # float32 [S, h, w, C], variance-preserving
    history: jax.Array  # float32 [S, HISTORY - 1, h, w, C], newest first
    conditioning: Any  # the family's pytree of arrays [S, 2, ...]: unconditional, conditional
    guidance_scale: jax.Array  # float32 [S]
    seed: jax.Array  # uint32 [S]
    step: jax.Array  # int32 [S], the next row of the slot's table
    timesteps: jax.Array  # float32 [S, N]
    preview: jax.Array  # float32 [S, N, 2]
    table: Coefficients  # p, q, a, n float32 [S, N]; b float32 [S, N, HISTORY]
    edit: EditState | None = None  # None: the server takes no images


class Rows(NamedTuple):
    """Which slots share a step, and which rows the UNet gets for them. R rows hold at most R active slots."""

    slots: np.ndarray  # int32 [R], the active slots, padded with a number that no slot has
    owner: np.ndarray  # int32 [R], the row's position in `slots`
    conditional: np.ndarray  # int32 [R], 0: unconditional, 1: conditional
    uncond: np.ndarray  # int32 [R], for each of `slots` the row of its unconditional output
    cond: np.ndarray  # int32 [R], likewise of its conditional output; the same row where there is no guidance


def rows_of(active: Sequence[ActiveSlot], buckets: Sequence[int], padding: int) -> Rows:
    """The rows of the active slots in the smallest bucket that holds them. A guided slot's two rows are neighbours."""
    needed = sum(slot.rows for slot in active)
    bucket = next(bucket for bucket in buckets if bucket >= needed)
    rows = Rows(np.full(bucket, padding, np.int32), *(np.zeros(bucket, np.int32) for _ in range(4)))
    row = 0
    for position, slot in enumerate(active):
        rows.slots[position] = slot.slot
        rows.uncond[position], rows.cond[position] = row, row + slot.guided
        rows.owner[row : row + slot.rows] = position
        rows.conditional[row : row + slot.rows] = [0, 1] if slot.guided else [1]
        row += slot.rows
    return rows


def encode_program(
    family: Family, networks: Networks, params: Any, input_ids: Mapping[str, jax.Array], count: jax.Array | None = None
) -> list[Any]:
    """Encodes the first `count` texts one after the other, so padding costs nothing and neighbours change no bit.

    Without a count there is no loop, and `input_ids` is one text.
    """
    encode = partial(family.encode, modules_of(networks, params))
    if count is None:
        return [jax.tree.map(lambda x: x[0], encode(input_ids))]
    texts = len(next(iter(input_ids.values())))
    single = jax.eval_shape(encode, jax.tree.map(lambda ids: ids[:1], input_ids))

    def encode_text(i: jax.Array, encoded: Any) -> Any:
        ids = jax.tree.map(lambda ids: jax.lax.dynamic_slice_in_dim(ids, i, 1), input_ids)
        return jax.tree.map(
            lambda x, text: jax.lax.dynamic_update_slice_in_dim(x, text, i, axis=0), encoded, encode(ids)
        )

    empty = jax.tree.map(lambda x: jnp.zeros((texts, *x.shape[1:]), x.dtype), single)
    encoded = jax.lax.fori_loop(0, count, encode_text, empty)
    return [jax.tree.map(lambda x, i=i: x[i], encoded) for i in range(texts)]


def insert_program(
    state: DenoiseState,
    slot: jax.Array,
    uncond: Any,
    cond: Any,
    numbers: Mapping[str, jax.Array],
    guidance_scale: jax.Array,
    seed: jax.Array,
    initial_scale: jax.Array,
    timesteps: jax.Array,
    preview: jax.Array,
    table: Coefficients,
    edit: EditInputs | None = None,
) -> DenoiseState:
    """Starts an image in a slot, as noise that its seed alone decides, and as a share of the image that it edits."""
    noise = slot_noise(seed, jnp.int32(0), state.latents.shape[1:])
    latents, kept = initial_scale * noise, None
    if edit is not None:
        drawn = (slot_noise(seed, jnp.int32(number), noise.shape) for number in (POSTERIOR, OUTSIDE_POSTERIOR))
        kept = started(edit, *drawn)
        latents = edit.signal * kept.original + latents
    conditioning = jax.tree.map(lambda *rows: jnp.stack(rows), uncond, cond)
    image = DenoiseState(
        latents=latents,
        history=jnp.zeros(state.history.shape[1:]),
        conditioning={**conditioning, **numbers} if numbers else conditioning,
        # As in diffusers, a scale of 1 or less means no guidance.
        guidance_scale=jnp.maximum(guidance_scale, 1.0),
        seed=seed,
        step=jnp.int32(0),
        timesteps=timesteps,
        preview=preview,
        table=table,
        edit=kept,
    )
    return jax.tree.map(lambda slots, value: slots.at[slot].set(value.astype(slots.dtype)), state, image)


def export_program(state: DenoiseState, slot: jax.Array) -> DenoiseState:
    """One slot's part of every array of the state."""
    return jax.tree.map(lambda slots: slots[slot], state)


def import_program(state: DenoiseState, slot: jax.Array, image: DenoiseState) -> DenoiseState:
    """Puts an exported image into a slot."""
    return jax.tree.map(lambda slots, value: slots.at[slot].set(value), state, image)


def step_program(
    family: Family,
    networks: Networks,
    sharding: NamedSharding,
    placing: Any,
    params: Any,
    state: DenoiseState,
    rows: Rows,
    count: jax.Array | None = None,
    *,
    looks: bool = False,
) -> tuple[DenoiseState, jax.Array]:
    """Gathers the active slots, `count` times denoises their rows and applies the tables, and scatters.

    Without a count there is no loop: it is one step. Where none of the slots looks at images, those need not be read.
    `placing` is how the params lie on the chips.
    """
    active: DenoiseState = jax.tree.map(lambda x: x.at[rows.slots].get(mode="clip"), state)
    positions = jnp.arange(len(rows.slots))
    conditioning = jax.tree.map(lambda x: x[rows.owner, rows.conditional], active.conditioning)
    if active.edit and active.edit.outside is not None:
        conditioning = {**conditioning, OUTSIDE: active.edit.outside[rows.owner]}
    if active.edit and looks:
        conditioning = {**conditioning, REFERENCES: jax.tree.map(lambda x: x[rows.owner], active.edit.references)}
    predict_rows = partial(predict_noise, family, networks, together_on(sharding), shards=image_shards(sharding))
    predict = divided(predict_rows, sharding, placing)
    draw = jax.vmap(partial(slot_noise, shape=state.latents.shape[1:]))
    put_back = partial(blended, active.edit, draw(active.seed, jnp.zeros_like(active.step))) if active.edit else None
    replicated = partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(sharding.mesh, PartitionSpec()))

    def step(
        _: int | jax.Array, moving: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        latents, history, at = moving
        timesteps = active.timesteps[positions, at]
        noise_pred = replicated(predict(params, latents[rows.owner], timesteps[rows.owner], conditioning))
        uncond, cond = noise_pred[rows.uncond], noise_pred[rows.cond]
        noise_pred = uncond + active.guidance_scale[:, None, None, None] * (cond - uncond)
        coefficients = jax.tree.map(lambda x: x[positions, at], active.table)
        latents, history = update(latents, noise_pred, history, draw(active.seed, at + 1), coefficients)
        if put_back:
            latents = put_back(latents, at)
        return latents, history, at + 1

    moving = (active.latents, active.history, active.step)
    latents, history, at = step(0, moving) if count is None else jax.lax.fori_loop(0, count, step, moving)
    state = state._replace(
        latents=state.latents.at[rows.slots].set(latents, mode="drop"),
        history=state.history.at[rows.slots].set(history, mode="drop"),
        step=state.step.at[rows.slots].set(at, mode="drop"),
    )
    return state, at[0]


def predict_noise(
    family: Family,
    networks: Networks,
    together: int | None,
    params: Any,
    latents: jax.Array,
    timesteps: jax.Array,
    conditioning: Any,
    *,
    shards: ImageShards | None = None,
) -> jax.Array:
    """The denoiser over one chip's rows: `together` of them at a time or fewer large ones, pass after pass.

    With `shards` the latents are this chip's part of their images.
    """
    rows, height, width = latents.shape[:3]
    passes = passes_of(rows, rows_at(height * width, together))
    strips = strips_of(rows // passes, height // family.strip_rows, together)
    predict = partial(family.denoise, modules_of(networks, params), strips=Strips(strips, shards))
    inputs = (latents, timesteps, conditioning)
    if passes == 1:
        noise_pred = predict(*inputs)
    else:
        parts = jax.tree.map(lambda x: x.reshape(passes, -1, *x.shape[1:]), inputs)
        noise_pred = jax.lax.map(lambda part: predict(*part), parts).reshape(latents.shape)
    return noise_pred.astype(jnp.float32)


def decode_program(
    family: Family,
    networks: Networks,
    sharding: NamedSharding,
    placing: Any,
    params: Any,
    latents: jax.Array,
    slots: jax.Array,
) -> jax.Array:
    """The images of these slots: uint8 [R, H, W, 3]."""
    rows = partial(decode_rows, family, networks, together_on(sharding), shards=image_shards(sharding))
    return divided(rows, sharding, placing)(params, latents.at[slots].get(mode="clip"))


def decode_rows(
    family: Family,
    networks: Networks,
    together: int | None,
    params: Any,
    latents: jax.Array,
    *,
    shards: ImageShards | None = None,
) -> jax.Array:
    """Where the strips of one image fill a chip, images are decoded one by one: intermediate arrays are smallest so.

    With `shards` the latents are this chip's part of their images.
    """
    strips = Strips(strips_of(1, latents.shape[1], together), shards)
    decode = partial(family.decode, modules_of(networks, params), strips=strips)
    if together is None or len(latents) == 1:
        return as_pixels(decode(latents))
    return jax.lax.map(lambda image: as_pixels(decode(image[None])[0]), latents)


def preview_program(
    size: Size,
    preview_map: jax.Array,
    latents: jax.Array,
    history: jax.Array,
    preview: jax.Array,
    step: jax.Array,
    slot: jax.Array,
) -> jax.Array:
    """The denoised image that the slot's last step predicted, by a linear map from latents to colours."""
    weights = preview[slot, jnp.maximum(step[slot] - 1, 0)]
    denoised = weights[0] * latents[slot] + weights[1] * history[slot, 0]  # [h, w, C]
    colours = denoised @ preview_map[:-1] + preview_map[None, None, -1]
    return as_pixels(jax.image.resize(colours, (size[1], size[0], 3), "linear"))[None]


def as_pixels(colours: jax.Array) -> jax.Array:
    """Colours around [-1, 1] as uint8."""
    return jnp.round(jnp.clip(colours.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)


def slot_noise(seed: jax.Array, number: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise that depends on the seed and the step's number alone: not on slot, bucket or neighbours."""
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), shape)
