"""Everything that this project uses of JAX and that JAX keeps private, as it was seen in JAX 0.10.2.

No other module may name a private module of JAX. tests/aot/test_jax_internals.py holds that, and that each name is
still there.
"""

import io
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.stages import Compiled

JAX_VERSION = "0.10.2"  # before another one is pinned, look at everything in this module

# Names of events that JAX reports to listeners of jax.monitoring.
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
CACHE_HIT = "/jax/compilation_cache/cache_hits"

# All classes that JAX pickles around an executable whose arguments and results are arrays of numbers.
ENVELOPE = {
    ("jax", "P"),
    ("jax._src.core", "ManualAxisType"),
    ("jax._src.core", "MemorySpace"),
    ("jax._src.core", "ShapedArray"),
    ("jax._src.interpreters.pxla", "AllArgsInfo"),
    ("jax._src.interpreters.pxla", "UnloadedMeshExecutable"),
    ("jax._src.layout", "Layout"),
    ("jax._src.linear_util", "DebugInfo"),
    ("jax._src.mesh", "AbstractDevice"),
    ("jax._src.mesh", "AbstractMesh"),
    ("jax._src.mesh", "AxisType"),
    ("jax._src.mesh", "Mesh"),
    ("jax._src.named_sharding", "_unpickle_named_sharding"),
    ("jax._src.sharding_impls", "_unpickle_single_device_sharding"),
    ("jax._src.stages", "ArgInfo"),
    ("jaxlib._jax", "DeviceList"),
    ("ml_dtypes", "bfloat16"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
}


class UnknownClass(Exception):
    """A saved executable names a class outside `ENVELOPE`."""


class Unpickler(serialize_executable._JaxPjrtUnpickler):
    """JAX's own unpickler, for the classes in `ENVELOPE` alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ENVELOPE:
            raise UnknownClass(f"it asks for {module}.{name}, which no saved program needs.")
        return super().find_class(module, name)


def load_executable(content: bytes, device_ids: Sequence[int], arguments: tuple[Any, ...], out_tree: Any) -> Compiled:
    """`serialize_executable.deserialize_and_load` with `Unpickler`; `arguments` as they were declared."""
    client = jax.devices()[0].client
    devices = {device.id: device for device in client.devices()}
    unpickler: Any = Unpickler
    chosen = tuple(devices[i] for i in device_ids)
    unloaded, infos, no_kwargs = unpickler(io.BytesIO(content), client, chosen).load()
    in_tree: Any = jax.tree.structure((arguments, {}))
    return Compiled(unloaded.load(), [], in_tree.unflatten(infos), out_tree, no_kwargs=no_kwargs)


def devices_of(executable: Compiled) -> Iterable[jax.Device]:
    runtime: Any = executable.runtime_executable()
    if hasattr(runtime, "local_devices"):
        devices: Iterable[jax.Device] = runtime.local_devices()
        return devices
    result: Any = jax.tree.leaves(executable.output_shardings)[0]  # compiled for devices of another machine
    return list(result.mesh.devices.flat)
