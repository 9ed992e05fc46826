"""DESIGN.md's import directions, read from the source: what a module imports when it is imported, and what it may not.

An import inside a function or under TYPE_CHECKING is no import-time import: that is how server.py leaves JAX to its
replicas. Where a rule says `anywhere`, those count too.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from app.program_sources import imported_by, module_of, packages_of

ROOT = Path(__file__).resolve().parents[1]
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers"}
HTTP = {"starlette", "fastapi", "uvicorn", "aiohttp"}


class Rule(NamedTuple):
    modules: str  # a module, or all below it with a trailing dot
    forbidden: set[str]
    anywhere: bool = True  # False: not while it is imported, itself or through others


RULES = [
    Rule("app.ingress", JAX, anywhere=False),
    Rule("app.builders", JAX, anywhere=False),
    Rule("app.protocol", JAX | HTTP | {"ray"}, anywhere=False),
    Rule("app.images", JAX | HTTP | {"ray"}, anywhere=False),
    Rule("app.ingress", JAX | {"app.engine", "app.pipeline", "app.models", "app.server"}),
    Rule("app.protocol", {"app.engine", "app.pipeline", "app.models", "app.server", "app.ingress"}),
    Rule("app.engine", HTTP | {"ray", "app.server", "app.ingress", "app.builders", "app.models"}),
    Rule("app.engine", JAX, anywhere=False),
    Rule("app.admission", JAX | HTTP | {"ray", "app"}),
    Rule("app.stall", JAX | HTTP | {"ray", "app", "numpy"}),
    Rule("app.worker", JAX | HTTP | {"ray", "app", "numpy"}),
    Rule("app.line", HTTP | {"ray", "app.engine", "app.server", "app.ingress", "app.builders", "app.models"}),
    Rule("app.line", JAX, anywhere=False),
    Rule("app.programs", HTTP | {"ray", "app.engine", "app.pipeline", "app.models", "app.server", "app.ingress"}),
    Rule("app.program_files", HTTP | {"ray", "app"}),
    Rule("app.program_sources", JAX | HTTP | {"ray", "app", "numpy"}),
    Rule("app.program_keys", HTTP | {"ray", "app.programs", "app.program_files", "app.pipeline"}, anywhere=False),
    Rule("app.metrics", JAX | HTTP | {"app"}),
    Rule("app.keys", JAX | HTTP | {"ray", "app", "numpy"}),
    Rule("app.door", JAX | {"ray", "app.engine", "app.pipeline", "app.models", "app.server", "app.ingress"}),
    Rule("app.proxy", JAX | {"app.engine", "app.pipeline", "app.models", "app.server", "app.ingress", "app.door"}),
    Rule("app.proxy", JAX | {"PIL", "transformers"}, anywhere=False),
    Rule("app.proxy_protocol", JAX | {"ray", "starlette", "app.door", "app.ingress", "app.server", "app.engine"}),
    Rule("app.stats", JAX | HTTP | {"app"}),
    Rule("app.watch", JAX | HTTP | {"app.engine", "app.pipeline", "app.models", "app.server", "app.ingress"}),
    Rule("app.retry", JAX | HTTP | {"ray", "app.engine", "app.pipeline", "app.models", "app.server", "app.ingress"}),
    Rule("app.profiling", HTTP | {"ray", "app.engine", "app.pipeline", "app.server", "app.ingress"}),
    Rule("app.profiling", JAX, anywhere=False),
    Rule("app.streaming", JAX | {"ray", "app.engine", "app.pipeline", "app.server", "app.ingress"}),
    Rule("app.pipeline", HTTP | {"ray", "app.engine", "app.server", "app.ingress", "app.protocol"}),
    Rule("loadtest.", JAX | {"ray", "app.engine", "app.pipeline", "app.models", "app.server", "app.ingress"}),
    Rule("loadtest.", JAX | {"ray"}, anywhere=False),
    *(
        Rule(f"app.models.{name}", JAX | {"numpy"})
        for name in ("config", "errors", "scheduler_config", "tokenizer_files")
    ),
    Rule("app.models.", HTTP | {"ray", "app.engine", "app.pipeline", "app.server", "app.ingress", "app.protocol"}),
]
SAMPLERS_MAY_USE = {"numpy", *sys.stdlib_module_names}


def imports(file: Path, module: str, *, anywhere: bool) -> Iterator[str]:
    """Dotted names as imported: by any statement, or by those that importing `module` carries out."""
    pending: list[ast.AST] = [ast.parse(file.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported_by(node, file, module)
        elif anywhere:
            pending.extend(ast.iter_child_nodes(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))


def modules(root: Path) -> dict[str, Path]:
    files = sorted(file for package in ("app", "loadtest") for file in (root / package).rglob("*.py"))
    return {module_of(file, root): file for file in files}


def chains(root: Path, module: str) -> dict[str, str]:
    """All that importing `module` imports, each with the way to it: 'app.a -> app.b -> jax'."""
    files = modules(root)
    ways: dict[str, str] = {}
    pending = [(module, module)]
    while pending:
        name, way = pending.pop()
        for imported in {*imports(files[name], name, anywhere=False), *packages_of(name)}:
            if imported not in ways:
                ways[imported] = f"{way} -> {imported}"
                if imported in files:
                    pending.append((imported, ways[imported]))
    return ways


def within(imported: str, names: set[str]) -> bool:
    return any(imported == name or imported.startswith(f"{name}.") for name in names)


def violations(root: Path) -> list[str]:
    files = modules(root)
    found = []
    for rule in RULES:
        for module, file in files.items():
            if module != rule.modules and not (rule.modules.endswith(".") and module.startswith(rule.modules)):
                continue
            if rule.anywhere:
                ways = {name: f"{module} -> {name}" for name in imports(file, module, anywhere=True)}
            else:
                ways = chains(root, module)
            found += [way for name, way in ways.items() if within(name, rule.forbidden)]
    for name in imports(files["app.samplers"], "app.samplers", anywhere=True):
        if not within(name, SAMPLERS_MAY_USE):
            found.append(f"app.samplers -> {name}")
    return found


def test_imports_go_one_way() -> None:
    assert not violations(ROOT)


def test_every_rule_is_about_a_module_that_exists() -> None:
    files = modules(ROOT)
    for rule in RULES:
        assert any(name == rule.modules or name.startswith(rule.modules) for name in files), rule.modules


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("ingress", "import jax.numpy as jnp", "app.ingress -> jax.numpy"),
        ("ingress", "def f():\n    from app import engine", "app.ingress -> app.engine"),
        ("ingress", "from .images import x", "app.ingress -> app.images -> jax"),
        ("ingress", "try:\n    import app.images\nexcept ImportError:\n    pass", "app.ingress -> app.images -> jax"),
        ("protocol", "from ray import serve", "app.protocol -> ray"),
        ("protocol", "class A:\n    import starlette", "app.protocol -> starlette"),
        ("builders", "from app.server import S", "app.builders -> app.server -> app.pipeline -> flax"),
        ("engine", "def f():\n    import ray.serve", "app.engine -> ray.serve"),
        ("engine", "if x:\n    from starlette.requests import Request", "app.engine -> starlette.requests"),
        ("pipeline", "from app import engine", "app.pipeline -> app.engine"),
        ("models/unet", "from ray.util import tpu", "app.models.unet -> ray.util"),
        ("models/unet", "from ..engine import Engine", "app.models.unet -> app.engine"),
        ("models/deep/er", "from ...pipeline import x", "app.models.deep.er -> app.pipeline"),
        ("samplers", "import scipy", "app.samplers -> scipy"),
        ("samplers", "def f():\n    import app.models", "app.samplers -> app.models"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, source: str, found: str) -> None:
    sound = {
        "__init__": "",
        "ingress": "from app.protocol import x",
        "builders": "import ray\nfrom app.ingress import x",
        "protocol": "from app.samplers import SAMPLERS",
        "images": "import jax" if "images" in source else "import PIL",
        "server": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import app.pipeline",
        "engine": "from app.protocol import x",
        "pipeline": "import flax",
        "samplers": "import numpy as np",
        "models/__init__": "",
        "models/unet": "import jax\nfrom app.models import layers",
    }
    if file == "builders":
        sound["server"] = "from app.pipeline import x"
    for name, text in sound.items():
        path = tmp_path / "app" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = set(violations(tmp_path))
    path = tmp_path / "app" / f"{file}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert found in set(violations(tmp_path)) - before


def test_a_lazy_import_is_not_an_import_time_import(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    for name, text in {
        "ingress": "import app.server",
        "server": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax\ndef f():\n    import jax",
    }.items():
        (tmp_path / "app" / f"{name}.py").write_text(text)
    assert "jax" not in chains(tmp_path, "app.ingress")
