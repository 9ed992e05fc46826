"""The verbs that the engine needs of a pipeline. Knows nothing of what computes them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from app.diffusion.samplers import SamplerTable
from app.types import ActiveSlot, Capabilities, DispatchCost, Edit, Generation, Size


class Verbs(Protocol):
    """A pipeline, or its stand-in (app/engine/virtual.py).

    Verbs dispatch work to the device; on some devices a call returns only when the work is done. `wait` takes what
    `step`, `decode` or `encode_image` returned. `insert`, `import_slot` and `step` consume the state that they are
    given. An image goes to another pipeline as export_slot -> bytes -> unpacked -> import_slot. All times are measured.
    """

    num_slots: int
    sizes: tuple[Size, ...]
    row_buckets: tuple[int, ...]
    decode_buckets: tuple[int, ...]
    default_sampler: str
    capabilities: Capabilities

    @property
    def step_s(self) -> Mapping[tuple[Size, int], float]: ...  # seconds of a step by size and row bucket
    @property
    def launch_s(self) -> Mapping[tuple[Size, int], float]: ...  # what a dispatch adds to its steps, by the same
    @property
    def decode_s(self) -> Mapping[tuple[Size, int], float]: ...  # seconds of a decode by size and decode bucket
    @property
    def encode_image_s(self) -> Mapping[Size, float]: ...  # seconds by size; empty where the pipeline takes no images
    @property
    def reference_step_s(self) -> Mapping[tuple[Size, int], float]: ...  # of slots that look at images; else empty
    @property
    def dispatch_cost(self) -> DispatchCost: ...

    def check(self, generation: Generation) -> Generation: ...
    def table(
        self, sampler: str | None, num_inference_steps: int, size: Size | None = None, strength: float | None = None
    ) -> SamplerTable: ...
    def empty_state(self, size: Size) -> Any: ...
    def encode(self, texts: Sequence[str]) -> list[Any]: ...
    def encode_image(self, edit: Edit, size: Size) -> Any: ...  # for `insert` and `wait`
    def insert(
        self,
        state: Any,
        slot: int,
        prompt: Any,
        negative_prompt: Any,
        table: SamplerTable,
        guidance_scale: float,
        seed: int,
        fields: Mapping[str, Any] = ...,  # of the request, that only some models have
        edit: Any = None,  # what encode_image made
    ) -> Any: ...
    def step(self, state: Any, active: Sequence[ActiveSlot], count: int) -> tuple[Any, Any]: ...
    def decode(self, state: Any, slots: Sequence[int]) -> Any: ...
    def preview(self, state: Any, slot: int) -> Any: ...
    def export_slot(self, state: Any, slot: int) -> Any: ...  # `bytes` of it waits for the device
    def unpacked(self, size: Size, packed: bytes) -> Any: ...  # raises ValueError for what does not fit
    def import_slot(self, state: Any, slot: int, image: Any) -> Any: ...
    def wait(self, done: Any) -> None: ...
