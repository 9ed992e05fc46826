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

from app.aot.sources import imported_by, module_of, packages_of

ROOT = Path(__file__).resolve().parents[1]
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers"}
HTTP = {"starlette", "fastapi", "uvicorn", "aiohttp"}


class Rule(NamedTuple):
    modules: str  # a module, or all below it with a trailing dot
    forbidden: set[str]
    anywhere: bool = True  # False: not while it is imported, itself or through others


RULES = [
    Rule("app.builders", JAX, anywhere=False),
    Rule("app.api.", JAX | {"app.aot", "app.diffusion.models", "app.diffusion.pipeline", "app.engine", "app.serving"}),
    Rule("app.api.proxy", {"PIL", "app.api.auth", "app.api.ingress"}, anywhere=False),
    *(
        Rule(f"app.api.{name}", HTTP | {"ray"}, anywhere=False)
        for name in ("api_keys", "prompt_files", "protocol", "retry")
    ),
    Rule("app.serving.", {"app.api.auth", "app.api.ingress", "app.api.proxy", "app.builders"}),
    Rule("app.serving.", JAX, anywhere=False),
    Rule("app.engine.", HTTP | {"ray", "app.aot", "app.api.ingress", "app.builders", "app.serving"}),
    Rule("app.engine.", JAX | {"app.diffusion.models", "app.diffusion.pipeline"}, anywhere=False),
    Rule("app.diffusion.", HTTP | {"ray", "app.api", "app.builders", "app.engine.engine", "app.serving"}),
    Rule("app.diffusion.images", JAX, anywhere=False),
    Rule("app.diffusion.models.", {"app.engine", "app.aot"}),
    *(
        Rule(f"app.diffusion.models.{name}", JAX | {"numpy"})
        for name in ("config", "errors", "scheduler_config", "tokenizer_files")
    ),
    Rule("app.aot.", HTTP | {"ray", "app.api", "app.builders", "app.diffusion", "app.engine", "app.serving"}),
    Rule("app.aot.sources", JAX | {"app", "numpy"}),
    Rule("loadtest.", JAX | {"ray", "app.aot", "app.diffusion.models", "app.diffusion.pipeline", "app.engine"}),
    Rule("loadtest.", JAX | {"ray"}, anywhere=False),
]
SAMPLERS_MAY_USE = {"numpy", "app.types", *sys.stdlib_module_names}


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
    for name in imports(files["app.diffusion.samplers"], "app.diffusion.samplers", anywhere=True):
        if not within(name, SAMPLERS_MAY_USE):
            found.append(f"app.diffusion.samplers -> {name}")
    return found


def test_imports_go_one_way() -> None:
    assert not violations(ROOT)


def test_every_rule_is_about_a_module_that_exists() -> None:
    files = modules(ROOT)
    for rule in RULES:
        assert any(name == rule.modules or name.startswith(rule.modules) for name in files), rule.modules


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("app.api.ingress", "import jax.numpy as jnp", "app.api.ingress -> jax.numpy"),
        ("app.api.ingress", "def f():\n    from app.engine import engine", "app.api.ingress -> app.engine.engine"),
        ("app.api.ingress", "from ..serving import x", "app.api.ingress -> app.serving"),
        (
            "app.builders",
            "try:\n    import app.diffusion.images\nexcept ImportError:\n    pass",
            "app.builders -> app.diffusion.images -> jax",
        ),
        ("app.api.protocol", "from ray import serve", "app.api.protocol -> ray"),
        ("app.api.protocol", "class A:\n    import starlette", "app.api.protocol -> starlette"),
        (
            "app.builders",
            "from app.serving.replica import S",
            "app.builders -> app.serving.replica -> app.diffusion.pipeline -> flax",
        ),
        ("app.engine.engine", "def f():\n    import ray.serve", "app.engine.engine -> ray.serve"),
        ("app.engine.engine", "if x:\n    from starlette.types import Scope", "app.engine.engine -> starlette.types"),
        ("app.diffusion.pipeline", "from app.engine import engine", "app.diffusion.pipeline -> app.engine.engine"),
        ("app.diffusion.models.unet", "from ray.util import tpu", "app.diffusion.models.unet -> ray.util"),
        ("app.diffusion.models.unet", "from ...engine import x", "app.diffusion.models.unet -> app.engine"),
        ("app.diffusion.models.deep.er", "from ....api import x", "app.diffusion.models.deep.er -> app.api"),
        ("app.diffusion.samplers", "import scipy", "app.diffusion.samplers -> scipy"),
        ("app.diffusion.samplers", "def f():\n    import app.aot", "app.diffusion.samplers -> app.aot"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, source: str, found: str) -> None:
    sound = {
        "app.__init__": "",
        "app.builders": "import ray\nfrom app.api.ingress import x",
        "app.api.ingress": "from app.api.protocol import x",
        "app.api.protocol": "from app.diffusion.samplers import SAMPLERS",
        "app.diffusion.images": "import jax" if "images" in source else "import PIL",
        "app.diffusion.models.unet": "import jax\nfrom app.diffusion.models import layers",
        "app.diffusion.pipeline": "import flax",
        "app.diffusion.samplers": "import numpy as np",
        "app.engine.engine": "from app.api.protocol import x",
        "app.serving.replica": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import app.diffusion.pipeline",
    }
    if module == "app.builders":
        sound["app.serving.replica"] = "from app.diffusion.pipeline import x"
    for name, text in sound.items():
        write(tmp_path, name, text)
    before = set(violations(tmp_path))
    write(tmp_path, module, source)
    assert found in set(violations(tmp_path)) - before


def write(root: Path, module: str, text: str) -> None:
    path = root / f"{module.replace('.', '/')}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_lazy_import_is_not_an_import_time_import(tmp_path: Path) -> None:
    write(tmp_path, "app.api.ingress", "import app.serving.replica")
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax\ndef f():\n    import jax"
    write(tmp_path, "app.serving.replica", text)
    assert "jax" not in chains(tmp_path, "app.api.ingress")
