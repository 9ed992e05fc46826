"""app/aot/jax_internals.py: each private name of JAX is still there, and is named nowhere else."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import serialize_executable
from jax.stages import Compiled

from app.aot import jax_internals
from app.aot.jax_internals import BACKEND_COMPILE, ENVELOPE, UnknownClass, Unpickler, devices_of, load_executable
from cluster import ROOT
from tests import compiling

PACKAGES = ("app", "benchmarks", "capacity", "cluster", "demo", "jobs", "loadtest")
PRIVATE = re.compile(r"jax(lib)?(\.\w+)*\.(_\w+)")  # jax._src.core, jax.experimental.x._Y, jaxlib._jax


def test_the_version_that_they_were_seen_in_is_the_one_that_is_pinned() -> None:
    pinned = re.findall(r"^jax==(\S+)", (ROOT / "requirements/runtime.txt").read_text(), re.MULTILINE)
    assert [jax.__version__] == pinned == [jax_internals.JAX_VERSION]


def private_names(file: Path) -> list[str]:
    """What a file names of JAX by an import, an attribute or a string: anything with an underscore in front."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node).replace("serialize_executable.", "jax.experimental.serialize_executable."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            names.append(node.value)
    return [name for name in names if PRIVATE.match(name)]


def test_no_other_module_names_a_private_module_of_jax() -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    assert {str(file.relative_to(ROOT)) for file in files if private_names(file)} == {"app/aot/jax_internals.py"}


@pytest.mark.parametrize(("module", "name"), sorted(ENVELOPE))
def test_each_class_of_the_envelope_is_there(module: str, name: str) -> None:
    assert callable(getattr(importlib.import_module(module), name))


def test_an_executable_is_pickled_and_loaded_as_it_is_here() -> None:
    """Calls each function of jax_internals once, and looks at the signatures that it relies on."""
    argument = jax.ShapeDtypeStruct((3,), jnp.float32)
    executable = jax.jit(jnp.sin).lower(argument).compile()
    content, _, out_tree = serialize_executable.serialize(executable)
    device_ids = [device.id for device in devices_of(executable)]
    loaded = load_executable(content, device_ids, (argument,), out_tree)
    x = jnp.arange(3.0)
    assert (loaded(x) == executable(x)).all()
    parameters = list(inspect.signature(Unpickler.__init__).parameters)
    assert parameters == ["self", "file", "backend", "execution_devices"]
    assert "no_kwargs" in inspect.signature(Compiled.__init__).parameters


def test_a_class_outside_of_the_envelope_is_refused() -> None:
    (argument,) = arguments = (jax.ShapeDtypeStruct((3,), jnp.float32),)
    content, _, out_tree = serialize_executable.serialize(jax.jit(jnp.sin).lower(argument).compile())
    assert b"ShapedArray" in content
    with pytest.raises(UnknownClass, match="which no saved program needs"):
        load_executable(content.replace(b"ShapedArray", b"ShapedBrray"), [0], arguments, out_tree)


def test_jax_reports_a_compile_by_its_event() -> None:
    events: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((5,), jnp.float32)).compile()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert BACKEND_COMPILE in events


def test_what_tests_compile_has_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiling.options, "xla_cpu_no_such_option", True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_cpu_no_such_option'"):
        jax.jit(lambda x: x + 2).lower(jax.ShapeDtypeStruct((5,), jnp.float32)).compile()
