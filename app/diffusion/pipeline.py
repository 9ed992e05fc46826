"""A checkpoint on the device and the verbs that the engine sees.

Knows nothing of queues, requests, Ray or HTTP. Every shape is declared at load; `warmup` loads or compiles all of them,
runs each and times it. Several chips hold the state and the weights each, and the rows of a step are divided among
them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from app.aot.cache_key import fingerprint
from app.aot.compile import compiled
from app.aot.libtpu_flags import set_flags
from app.aot.store import first_line
from app.diffusion.calibration import calibrate
from app.diffusion.declared_programs import (
    ENCODE_TEXTS,
    Shapes,
    declared,
    encoded_shapes,
    loops_on_device,
    part_of,
)
from app.diffusion.device_programs import DenoiseState, rows_of
from app.diffusion.edit_programs import EditInputs, Outside
from app.diffusion.edits import EncodedEdit, check_edit, levels_after, resolved
from app.diffusion.families.family import Component, Family, Role, weight_count
from app.diffusion.models.loading import Checkpoint, load_checkpoint
from app.diffusion.networks import network_of
from app.diffusion.packed_slot import ExportedSlot, unpack
from app.diffusion.samplers import (
    Coefficients,
    SamplerTable,
    default_sampler,
    departures,
    make_table,
    samplers_for,
    skipped_steps,
)
from app.diffusion.sharding import crowded, mesh_of, placed, weight_sharding
from app.types import ActiveSlot, Capabilities, DispatchCost, Edit, Generation, InvalidField, PipelineSpec, Size

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Encoded:
    """What a text adds to the conditioning, and whether it was too long for a text encoder."""

    conditioning: Any  # the family's pytree of arrays, without leading axes
    truncated: bool
    empty: bool = False


class Pipeline:
    """Every verb only dispatches. What blocks is `wait`, and `np.asarray` of decoded pixels."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: PipelineSpec,
        *,
        devices: Sequence[jax.Device] | None = None,
    ):
        family = checkpoint.family
        check_sizes(spec.sizes, family.size_multiple)
        self.spec = spec
        self.sizes = spec.sizes
        self.row_buckets = spec.row_buckets
        self.decode_buckets = spec.decode_buckets
        self.num_slots = spec.num_slots
        self.max_steps = spec.max_steps
        self.schedule = checkpoint.schedule
        self.samplers = samplers_for(self.schedule)
        self.default_sampler = default_sampler(self.schedule)
        self.notes = departures(self.schedule)
        self.request_defaults = family.defaults(self.schedule)
        self.request_fields = tuple(sorted(family.FIELDS))
        self.capabilities = capabilities_of(family, spec)
        self.tokenizers = checkpoint.tokenizers
        self.mesh = mesh_of(jax.local_devices() if devices is None else devices)
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())
        self.loops_on_device = loops_on_device(self.mesh)
        networks, params = {}, {}
        for name, network in checkpoint.networks.items():
            graph, variables = nnx.split(network)
            # Plain arrays go into a dispatch faster than Flax's variables.
            params[name], tree = jax.tree.flatten(variables)
            networks[name] = partial(network_of, graph, tree)
        self.shardings = {
            part: jax.tree.map(
                partial(weight_sharding, self.mesh, divided=divides(spec, family, component, self.mesh)), params[part]
            )
            for part, component in family.COMPONENTS.items()
        }
        self.params = placed(params, self.shardings)
        self.encoders, self.denoisers, self.decoders = (part_of(family, self.params, role) for role in get_args(Role))
        self.shapes = Shapes(spec, family, encoded_shapes(family, networks, self.params))
        self.zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.shapes.encoded)
        self.programs = declared(self.shapes, networks, self.params, self.shardings, self.mesh)
        self.blank: dict[Size, EditInputs] = {}  # on the device, by `warmup`
        self.run: Mapping[str, Callable[..., Any]] = {}
        # `warmup` measures these.
        self.step_s: dict[tuple[Size, int], float] = {}
        self.launch_s: dict[tuple[Size, int], float] = {}
        self.dispatch_cost = DispatchCost()
        self.decode_s: dict[tuple[Size, int], float] = {}
        self.encode_image_s: dict[Size, float] = {}
        self.preview_maps = dict.fromkeys(self.sizes, np.zeros((family.latent_channels + 1, 3), np.float32))

    @classmethod
    def load(cls, spec: PipelineSpec, *, devices: Sequence[jax.Device] | None = None) -> "Pipeline":
        """Raises ValueError that lists all problems of the checkpoint, or names the size that it cannot have.

        Raises RuntimeError where CUDA is to be used and there is no GPU. `devices` defaults to all of this host.
        """
        set_flags()
        check_platform()
        mesh = mesh_of(jax.local_devices() if devices is None else devices)

        def place(family: Family, component: Component, weight: np.ndarray) -> jax.Array:
            divided = divides(spec, family, component, mesh)
            return jax.device_put(weight, weight_sharding(mesh, weight, divided=divided))

        checkpoint = load_checkpoint(
            spec.model,
            revision=spec.revision,
            variant=spec.variant,
            tokenizer=spec.tokenizer,
            dtype=DTYPES[spec.dtype],
            image_encoder=spec.edits,
            place=place,
        )
        return cls(checkpoint, spec, devices=devices)

    def warmup(self) -> None:
        """Loads or compiles every declared program, runs each, and times those that the engine plans with."""
        self.blank = {size: self.blank_edit(size) for size in self.sizes if self.spec.edits}
        facts = fingerprint(self.mesh.devices.flat)
        self.run = compiled(self.programs, folder=self.spec.programs, fingerprint=facts)
        try:
            self.calibrate()
        except jax.errors.JaxRuntimeError as error:
            if self.spec.programs is None:
                raise
            logger.warning("A program failed at its first run, so all are compiled anew: %s", first_line(error))
            self.run = compiled(self.programs, folder=None, fingerprint=facts)
            self.calibrate()

    def calibrate(self) -> None:
        measured = calibrate(self)
        self.step_s, self.launch_s, self.decode_s = measured.step_s, measured.launch_s, measured.decode_s
        self.encode_image_s, self.dispatch_cost = measured.encode_image_s, measured.dispatch_cost
        self.preview_maps = measured.preview_maps

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Several texts go into a dispatch, but what a text becomes never depends on its neighbours."""
        tokens = {name: tokenizer(list(texts)) for name, tokenizer in self.tokenizers.items()}
        encoded: list[Any] = []
        together = ENCODE_TEXTS if self.loops_on_device else 1
        for first in range(0, len(texts), together):
            count = min(together, len(texts) - first)
            padded = {}
            for name, read in tokens.items():
                padded[name] = np.zeros((together, read.input_ids.shape[1]), np.int32)
                padded[name][:count] = read.input_ids[first : first + count]
            counts = [np.int32(count)] if self.loops_on_device else []
            encoded += self.run["encode"](self.encoders, padded, *counts)[:count]
        truncated = map(any, zip(*(read.truncated for read in tokens.values()), strict=True))
        empty = (not text for text in texts)
        return [Encoded(*text) for text in zip(encoded, truncated, empty, strict=True)]

    def encode_image(self, edit: Edit, size: Size) -> EncodedEdit:
        """What an edit of a picture of this size begins from. A dispatch for the image, and one more for what is
        outside its mask where the denoiser fills masks."""
        assert edit.image is not None
        family, nothing = self.shapes.family, np.zeros(edit.image.shape[:2], np.bool_)
        mask = ~nothing if edit.mask is None else edit.mask
        encode = partial(self.run[f"encode image {size[0]}x{size[1]}"], self.decoders, edit.image)
        pure_noise = edit.mask is not None and edit.strength == 1
        if not family.fills_masks:
            return EncodedEdit(encode(), family.latent_mask(mask), pure_noise)
        blank = self.blank[size]
        posterior = (blank.mean, blank.deviation) if pure_noise else encode(nothing)
        return EncodedEdit(posterior, family.latent_mask(mask), pure_noise, encode(mask))

    def insert(
        self,
        state: DenoiseState,
        slot: int,
        prompt: Encoded,
        negative_prompt: Encoded,
        table: SamplerTable,
        guidance_scale: float,
        seed: int,
        fields: Mapping[str, Any] = MappingProxyType({}),
        edit: EncodedEdit | None = None,
    ) -> DenoiseState:
        """Starts an image in a slot, as noise that its seed alone decides, or from what `encode_image` made of another.

        Consumes `state`. `fields` are values of the family's own request fields.
        """
        family, edits = self.shapes.family, []
        initial_scale = table.initial_scale
        if self.spec.edits:
            inputs = self.blank[self.size(state)]
            if edit is not None:
                signal, initial_scale = (0.0, initial_scale) if edit.pure_noise else table.levels[0]
                levels = self.padded(levels_after(table))
                outside = Outside(*edit.outside, edit.redrawn) if edit.outside else None
                # What fills masks has learned where to draw: nothing is put back.
                kept = np.zeros_like(edit.redrawn) if edit.outside else 1 - edit.redrawn
                inputs = EditInputs(*edit.posterior, kept, np.float32(signal), levels, outside)
            edits.append(inputs)
        zero = family.zero_negative and negative_prompt.empty
        return self.run[f"insert {self.label(state)}"](
            state,
            np.int32(slot),
            self.zeros if zero else negative_prompt.conditioning,
            prompt.conditioning,
            family.numbers(self.size(state), guidance_scale, fields),
            np.float32(guidance_scale),
            np.uint32(seed),
            np.float32(initial_scale),
            self.padded(table.timesteps),
            self.padded(table.preview),
            Coefficients(*(self.padded(getattr(table, name)) for name in Coefficients._fields)),
            *edits,
        )

    def step(self, state: DenoiseState, active: Sequence[ActiveSlot], count: int = 1) -> tuple[DenoiseState, jax.Array]:
        """Denoises these slots by `count` steps, in the smallest bucket that holds their rows.

        No slot may go beyond the end of its table. Consumes `state`; `wait` takes the second result.
        """
        rows = rows_of(active, self.row_buckets, self.num_slots)
        program = self.run[f"step {self.label(state)} rows {len(rows.slots)}"]
        dispatches, counts = (1, [np.int32(count)]) if self.loops_on_device else (count, [])
        for _ in range(dispatches):
            state, done = program(self.denoisers, state, rows, *counts)
        return state, done

    def decode(self, state: DenoiseState, slots: Sequence[int]) -> jax.Array:
        """The slots' images, uint8 [bucket, H, W, 3] in the order of `slots`. Rows past `len(slots)` are padding."""
        bucket = next(bucket for bucket in self.decode_buckets if bucket >= len(slots))
        padded = np.array([*slots, *[self.num_slots] * (bucket - len(slots))], np.int32)
        return self.run[f"decode {self.label(state)} images {bucket}"](self.decoders, state.latents, padded)

    def preview(self, state: DenoiseState, slot: int) -> jax.Array:
        """An unfinished image as its last step saw it, by a linear map instead of the VAE: uint8 [1, H, W, 3]."""
        preview_map = self.preview_maps[self.size(state)]
        arrays = (preview_map, state.latents, state.history, state.preview, state.step)
        return self.run[f"preview {self.label(state)}"](*arrays, np.int32(slot))

    def export_slot(self, state: DenoiseState, slot: int) -> ExportedSlot:
        """All that an unfinished image depends on. `bytes` of it waits for the device."""
        return ExportedSlot(self.spec, self.run[f"export {self.label(state)}"](state, np.int32(slot)))

    def unpacked(self, size: Size, packed: bytes) -> DenoiseState:
        """What `import_slot` takes. Raises ValueError for bytes that are not of this model, or damaged."""
        image: DenoiseState = unpack(self.spec, self.shapes.slot(size), packed)
        return image

    def import_slot(self, state: DenoiseState, slot: int, image: DenoiseState) -> DenoiseState:
        """Goes on with an image that another pipeline exported. Consumes `state`."""
        imported: DenoiseState = self.run[f"import {self.label(state)}"](state, np.int32(slot), image)
        return imported

    def wait(self, done: jax.Array | EncodedEdit) -> None:
        """Blocks until the dispatch that returned `done` has run. Raises what it failed with."""
        done.block_until_ready()

    def empty_state(self, size: Size) -> DenoiseState:
        """Free slots of one of the declared sizes."""
        empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.shapes.state(size))
        return jax.device_put(empty, self.everywhere)

    def blank_edit(self, size: Size) -> EditInputs:
        """What `insert` takes of a picture that begins from noise alone."""
        empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.shapes.edit_inputs(size))
        return jax.device_put(empty, self.everywhere)

    def check(self, generation: Generation) -> Generation:
        """The request as this checkpoint follows it. Raises InvalidField for one that it cannot follow."""
        family = self.shapes.family
        family.check(generation)
        check_edit(generation, self.capabilities, self.sizes)
        for name, _ in generation.fields:
            if name not in family.FIELDS:
                raise InvalidField(name, f"{name} is not a field of this model; leave it out.", "unsupported_parameter")
        edit = resolved(generation.edit, self.capabilities)
        return replace(generation, edit=edit, guidance_embedded=family.embeds_guidance)

    def table(
        self, sampler: str | None, num_inference_steps: int, size: Size | None = None, strength: float | None = None
    ) -> SamplerTable:
        """For images of a declared size, by default the first. With a `strength` the steps that an edit leaves out are
        not in it.

        Raises InvalidField where the sampler, or so many steps of it, does not suit this checkpoint.
        """
        if num_inference_steps > self.max_steps:
            message = f"num_inference_steps must be between 1 and {self.max_steps}, got {num_inference_steps}."
            raise InvalidField("num_inference_steps", message)
        image_tokens = self.shapes.family.image_tokens(size or self.sizes[0])
        begin = 0 if strength is None else skipped_steps(strength, num_inference_steps, self.schedule)
        return make_table(sampler or self.default_sampler, num_inference_steps, self.schedule, image_tokens, begin)

    def size(self, state: DenoiseState) -> Size:
        height, width = state.latents.shape[1:3]
        pixels = self.shapes.family.pixels_per_latent
        return width * pixels, height * pixels

    def label(self, state: DenoiseState) -> str:
        """The size in the names of programs."""
        width, height = self.size(state)
        return f"{width}x{height}"

    def padded(self, rows: np.ndarray) -> np.ndarray:
        """Rows of a table, up to the number of rows that programs take."""
        padded = np.zeros((self.shapes.table_rows, *rows.shape[1:]), np.float32)
        padded[: len(rows)] = rows
        return padded


def capabilities_of(family: Family, spec: PipelineSpec) -> Capabilities:
    """Raises ValueError where the config turns edits on that the model cannot make, or off where it makes no others."""
    able = family.capabilities
    if spec.edits and not able.edits:
        raise ValueError(f"edits must be false for a {type(family).__name__}, which encodes no images, got true.")
    if not spec.edits and not able.generations:
        raise ValueError("edits must be true for this checkpoint, whose UNet only fills masks, got false.")
    return able if spec.edits else Capabilities()


def check_platform() -> None:
    """JAX leaves `cuda` out in silence where it sees no NVIDIA GPU, and takes the next of its platforms."""
    platforms: str = getattr(jax.config, "jax_platforms", None) or ""
    if platforms.partition(",")[0] == "cuda" and jax.default_backend() != "gpu":
        raise RuntimeError(f"JAX_PLATFORMS is {platforms}, and JAX sees no NVIDIA GPU here; see docs/nvidia.md.")


def divides(spec: PipelineSpec, family: Family, component: Component, mesh: Mesh) -> bool:
    """Whether the chips divide the weights of a component: only of text encoders, which run once an image."""
    if component.role != "encode" or mesh.size == 1:
        return False
    if spec.shard_text_encoders != "auto":
        return spec.shard_text_encoders
    return crowded(mesh, weight_count(family) * jnp.dtype(DTYPES[spec.dtype]).itemsize)


def check_sizes(sizes: Sequence[Size], multiple: int) -> None:
    for width, height in sizes:
        if width % multiple or height % multiple:
            raise ValueError(
                f"sizes must have a width and a height that are multiples of {multiple} for this checkpoint, "
                f"got {width}x{height}."
            )
