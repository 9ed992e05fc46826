"""A checkpoint on the device and the verbs that the engine sees.

Knows nothing of queues, requests, Ray or HTTP. Every shape is declared at load; `warmup` loads or compiles all of them,
runs each and times it. Several chips hold the state and the weights each, and divide the rows of a step among them;
where there are fewer rows than chips, their images too.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

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
    label_of,
    loops_on_device,
    part_of,
    step_name,
    zeros_of,
)
from app.diffusion.device_programs import DenoiseState, rows_of
from app.diffusion.edit_inputs import EncodedEdit, ImagePrograms, edit_inputs, encoded_edit, initial_shares
from app.diffusion.edit_programs import EditInputs
from app.diffusion.families.family import Role
from app.diffusion.limits import capabilities_of, check_sizes, checked
from app.diffusion.models.loading import Checkpoint
from app.diffusion.packed_slot import ExportedSlot, unpack
from app.diffusion.samplers import SamplerTable, default_sampler, departures, make_table, samplers_for, skipped_steps
from app.diffusion.samplers.table import columns
from app.diffusion.sharding import mesh_of, placed
from app.diffusion.text_encoding import Encoded, encoded_texts
from app.diffusion.weights import load_onto, shardings_of, split
from app.types import ActiveSlot, DispatchCost, Edit, Generation, InvalidField, PipelineSpec, Size

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files


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
        check_sizes(spec, family)
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
        networks, params = split(checkpoint.networks)
        shardings = shardings_of(spec, family, params, self.mesh)
        self.params, self.shardings = placed(params, shardings), shardings
        self.encoders, self.denoisers, self.decoders = (part_of(family, self.params, role) for role in get_args(Role))
        self.shapes = Shapes(spec, family, encoded_shapes(family, networks, self.params))
        self.zeros = zeros_of(self.shapes.encoded)
        self.programs = declared(self.shapes, networks, self.params, shardings, self.mesh)
        self.blank: dict[Size, EditInputs] = {}  # on the device, by `warmup`
        self.run: Mapping[str, Callable[..., Any]] = {}
        # `warmup` measures these.
        self.step_s: dict[tuple[Size, int], float] = {}
        self.launch_s: dict[tuple[Size, int], float] = {}
        self.dispatch_cost = DispatchCost()
        self.decode_s: dict[tuple[Size, int], float] = {}
        self.encode_image_s: dict[Size, float] = {}
        self.reference_step_s: dict[tuple[Size, int], float] = {}
        self.preview_maps = dict.fromkeys(self.sizes, np.zeros((family.latent_channels + 1, 3), np.float32))

    @classmethod
    def load(cls, spec: PipelineSpec, *, devices: Sequence[jax.Device] | None = None) -> "Pipeline":
        """Raises ValueError that lists all problems of the checkpoint, or names the size that it cannot have.

        Raises RuntimeError where CUDA is to be used and there is no GPU. `devices` defaults to all of this host.
        """
        set_flags()
        check_platform()
        mesh = mesh_of(jax.local_devices() if devices is None else devices)
        return cls(load_onto(mesh, spec), spec, devices=devices)

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
        self.encode_image_s, self.reference_step_s = measured.encode_image_s, measured.reference_step_s
        self.dispatch_cost, self.preview_maps = measured.dispatch_cost, measured.preview_maps

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Several texts go into a dispatch, but what a text becomes never depends on its neighbours."""

        def encode(input_ids: Mapping[str, np.ndarray], count: int) -> Any:
            counts = [np.int32(count)] if self.loops_on_device else []
            return self.run["encode"](self.encoders, input_ids, *counts)

        return encoded_texts(texts, self.tokenizers, encode, ENCODE_TEXTS if self.loops_on_device else 1)

    def encode_image(self, edit: Edit, size: Size) -> EncodedEdit:
        """What an edit of a picture of this size begins from and looks at. A dispatch for each image, and one more for
        what is outside its mask where the denoiser fills masks, or to place it where it looks at images."""
        programs = ImagePrograms(self.run, self.decoders, self.shapes.family.pixels_per_latent)
        return encoded_edit(edit, self.shapes.family, programs, self.blank[size])

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
        family, rows, edits = self.shapes.family, self.shapes.table_rows, []
        if self.spec.edits:
            edits.append(self.blank[self.shapes.size_of(state)] if edit is None else edit_inputs(edit, table, rows))
        _, initial_scale = initial_shares(table, edit)
        zero = family.zero_negative and negative_prompt.empty
        return self.run[f"insert {self.label(state)}"](
            state,
            np.int32(slot),
            self.zeros if zero else negative_prompt.conditioning,
            prompt.conditioning,
            family.numbers(self.shapes.size_of(state), guidance_scale, fields),
            np.float32(guidance_scale),
            np.uint32(seed),
            np.float32(initial_scale),
            *columns(table, rows),
            *edits,
        )

    def step(self, state: DenoiseState, active: Sequence[ActiveSlot], count: int = 1) -> tuple[DenoiseState, jax.Array]:
        """Denoises these slots by `count` steps, in the smallest bucket that holds their rows.

        No slot may go beyond the end of its table. Consumes `state`; `wait` takes the second result.
        """
        rows = rows_of(active, self.row_buckets, self.num_slots)
        looks = any(slot.looks for slot in active)
        program = self.run[step_name(self.label(state), len(rows.slots), looks=looks)]
        dispatches, counts = (1, [np.int32(count)]) if self.loops_on_device else (count, [])
        for _ in range(dispatches):
            state, done = program(self.denoisers, state, rows, *counts)
        return state, done

    def decode(self, state: DenoiseState, slots: Sequence[int]) -> jax.Array:
        """The slots' images, uint8 [bucket, H, W, 3] in the order of `slots`. Rows past `len(slots)` are padding."""
        bucket = next(bucket for bucket in self.decode_buckets if bucket >= len(slots))
        filled = np.array([*slots, *[self.num_slots] * (bucket - len(slots))], np.int32)
        return self.run[f"decode {self.label(state)} images {bucket}"](self.decoders, state.latents, filled)

    def preview(self, state: DenoiseState, slot: int) -> jax.Array:
        """An unfinished image as its last step saw it, by a linear map instead of the VAE: uint8 [1, H, W, 3]."""
        preview_map = self.preview_maps[self.shapes.size_of(state)]
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
        return jax.device_put(zeros_of(self.shapes.state(size)), self.everywhere)

    def blank_edit(self, size: Size) -> EditInputs:
        """What `insert` takes of a picture that begins from noise alone."""
        return jax.device_put(zeros_of(self.shapes.edit_inputs(size)), self.everywhere)

    def check(self, generation: Generation) -> Generation:
        """The request as this checkpoint follows it. Raises InvalidField for one that it cannot follow."""
        return checked(generation, self.shapes.family, self.capabilities, self.sizes)

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

    def label(self, state: DenoiseState) -> str:
        """The size in the names of programs."""
        return label_of(self.shapes.size_of(state))


def check_platform() -> None:
    """JAX leaves `cuda` out in silence where it sees no NVIDIA GPU, and takes the next of its platforms."""
    platforms: str = getattr(jax.config, "jax_platforms", None) or ""
    if platforms.partition(",")[0] == "cuda" and jax.default_backend() != "gpu":
        raise RuntimeError(f"JAX_PLATFORMS is {platforms}, and JAX sees no NVIDIA GPU here; see docs/nvidia.md.")
