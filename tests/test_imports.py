"""Checks the import rules of docs/architecture.md: what each package may import, and that there is no circle.

An import inside a function or under TYPE_CHECKING does not count as an import-time import: that is how app/builders.py
leaves JAX to the replicas.
"""

import ast
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from app.aot.sources import imported_by, module_of, packages_of
from cluster import ROOT

PACKAGES = ("app", "benchmarks", "capacity", "cluster", "demo", "jobs", "loadtest", "rehearsal")
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers"}
HTTP = {"starlette", "fastapi", "uvicorn", "aiohttp"}

# What each package may import of `app`, besides itself, anywhere in its code. A trailing dot means all modules below.
# The longest name that fits counts. app.builders joins all packages, and what is outside of `app` may use them.
MAY_IMPORT = {
    "app.": set(),
    "app.builders": {"app"},
    "app.api.": {"app.types", "app.ray_internals", "app.diffusion.samplers"},
    "app.api.routing.": {
        "app.api",
        "app.types",
        "app.diffusion.samplers",
        "app.engine.scheduler",
        "app.engine.cost_model",
    },
    "app.serving.": {"app.types", "app.engine", "app.diffusion", "app.aot", "app.ray_internals"}
    | {f"app.api.{name}" for name in ("errors", "messages", "settings")},
    "app.engine.": {"app.types", "app.diffusion.samplers"},
    "app.diffusion.": {"app.types", "app.aot"},
    "app.diffusion.samplers.": {"app.types"},
    "app.diffusion.families.": {"app.types", "app.diffusion.models", "app.diffusion.samplers"},
    "app.diffusion.models.": {"app.diffusion.samplers"},
    **dict.fromkeys(
        [f"app.diffusion.models.{name}" for name in ("checkpoint_files", "hub_files", "loading")],
        {"app.diffusion.models", "app.diffusion.families", "app.diffusion.samplers"},
    ),
    "app.aot.sources": set(),
    "loadtest.": {"app.api.prompt_files", "app.diffusion.images"},
}


class Rule(NamedTuple):
    modules: str  # a module, or all below it with a trailing dot
    forbidden: set[str]  # also while one of the modules is imported, through others
    lazily: bool = False  # True: an import inside a function may


RULES = [
    Rule("app.", {*PACKAGES} - {"app"}),
    Rule("app.types", JAX | HTTP | {"ray"}),
    Rule("app.builders", JAX, lazily=True),
    Rule("app.api.", JAX),
    Rule("app.api.routing.", HTTP | {"ray"}),
    Rule("app.api.proxy", {"PIL", "app.api.auth", "app.api.ingress"}),
    *(
        Rule(f"app.api.{name}", HTTP | {"ray"})
        for name in (
            "api_keys",
            "errors",
            "fields",
            "field_descriptions",
            "messages",
            "openapi",
            "prompt_files",
            "protocol",
            "retry_after",
            "settings",
        )
    ),
    Rule("app.serving.", HTTP),
    Rule("app.serving.", JAX, lazily=True),
    Rule("app.engine.", JAX | HTTP | {"ray"}),
    *(Rule(f"app.engine.{name}", {"threading", "time"}) for name in ("cost_model", "request", "scheduler")),
    Rule("app.diffusion.", HTTP | {"ray"}),
    Rule("app.diffusion.images", JAX),
    Rule("app.diffusion.families.", JAX, lazily=True),
    *(
        Rule(f"app.diffusion.models.{name}", JAX | {"numpy"})
        for name in (
            "config",
            "derived_configs",
            "errors",
            "flow_config",
            "flow_shapes",
            "ldm_names",
            "safetensors_header",
            "scheduler_config",
            "small_files",
            "tokenizer_files",
        )
    ),
    *(
        Rule(f"app.diffusion.models.{name}", JAX)
        for name in ("checkpoint_files", "hub_files", "single_file", "weight_files")
    ),
    Rule("app.aot.", HTTP | {"ray"}),
    Rule("app.aot.sources", JAX | {"numpy"}),
    Rule("loadtest.", JAX | {"ray"}, lazily=True),
    Rule("rehearsal.", JAX, lazily=True),
]
SAMPLERS_MAY_USE = {"numpy", "app.diffusion.samplers", "app.types", *sys.stdlib_module_names}


def imports(file: Path, module: str, *, anywhere: bool) -> frozenset[str]:
    """Dotted names as imported: by any statement, or by those that importing `module` carries out."""
    return imports_of(file.read_text(), file, module, anywhere)


@cache
def imports_of(text: str, file: Path, module: str, anywhere: bool) -> frozenset[str]:
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(text)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.update(imported_by(node, file, module))
        elif anywhere:
            pending.extend(ast.iter_child_nodes(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))
    return frozenset(names)


def modules(root: Path) -> dict[str, Path]:
    files = sorted(file for package in PACKAGES for file in (root / package).rglob("*.py"))
    return {module_of(file, root): file for file in files}


def chains(files: dict[str, Path], module: str) -> dict[str, str]:
    """Everything that importing `module` imports, each with the way to it: 'app.a -> app.b -> jax'."""
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


def applies(modules: str, module: str) -> bool:
    return module == modules or (modules.endswith(".") and module.startswith(modules))


def violations(root: Path) -> list[str]:
    ways = []
    files = modules(root)
    for module, file in files.items():
        direct = imports(file, module, anywhere=True)
        rules = [rule for rule in RULES if applies(rule.modules, module)]
        indirect = chains(files, module) if rules else {}
        key = max((key for key in MAY_IMPORT if applies(key, module)), key=len, default=None)
        if key:
            allowed = MAY_IMPORT[key] | {key.removesuffix(".")}
            # `from app.api import auth` names both; the package alone counts where nothing below it is a module.
            packages = {package for name in direct & {*files} for package in packages_of(name)}
            foreign = {name for name in direct - packages if within(name, {"app"}) and not within(name, allowed)}
            ways += [f"{module} -> {name}" for name in foreign]
        for rule in rules:
            if not rule.lazily:
                ways += [f"{module} -> {name}" for name in direct if within(name, rule.forbidden)]
            ways += [way for name, way in indirect.items() if within(name, rule.forbidden)]
        if within(module, {"app.diffusion.samplers"}):
            ways += [f"{module} -> {name}" for name in direct if not within(name, SAMPLERS_MAY_USE)]
    return ways


def circle(root: Path) -> list[str]:
    """Modules that import each other while they are imported; empty if there are none."""
    files = modules(root)
    graph = {name: {*imports(file, name, anywhere=False)} & {*files} - {name} for name, file in files.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_go_one_way() -> None:
    assert not violations(ROOT)


def test_no_modules_import_each_other() -> None:
    assert not circle(ROOT)


def test_a_circle_is_found(tmp_path: Path) -> None:
    write(tmp_path, "cluster.a", "from cluster import b")
    write(tmp_path, "cluster.b", "def f():\n    import cluster.a")
    assert not circle(tmp_path)
    write(tmp_path, "cluster.b", "import jobs.c")
    write(tmp_path, "jobs.c", "from cluster.a import x")
    assert {*circle(tmp_path)} == {"cluster.a", "cluster.b", "jobs.c"}


def test_a_config_is_read_through_its_model_and_not_through_the_linter() -> None:
    """Only commands that refuse errors before they begin import the linter, and only the linter imports rules."""
    linters, rules = set(), set()
    for file in (file for package in ("app", "capacity", "cluster", "jobs") for file in (ROOT / package).rglob("*.py")):
        module = module_of(file, ROOT)
        names = set(imports(file, module, anywhere=True))
        linters |= {module for name in names if within(name, {"cluster.config.lint"})}
        rules |= {module for name in names if within(name, {"cluster.config.rules"})}
    assert linters == {"cluster.deploy", "cluster.gke.__main__", "cluster.local.verbs", "cluster.remote.preflight"}
    assert rules == {"cluster.config.lint"}


def test_every_rule_is_about_a_module_that_exists() -> None:
    files = modules(ROOT)
    for name in (*MAY_IMPORT, *(rule.modules for rule in RULES)):
        assert any(applies(name, module) for module in files), name


@pytest.mark.parametrize(
    ("module", "source", "way"),
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
        ("app.engine.engine", "def f():\n    import jax", "app.engine.engine -> jax"),
        ("app.engine.engine", "import cluster.config", "app.engine.engine -> cluster.config"),
        ("app.diffusion.pipeline", "from app.api.messages import x", "app.diffusion.pipeline -> app.api.messages"),
        ("loadtest.plan", "from app.builders import Args", "loadtest.plan -> app.builders"),
        ("app.engine.engine", "def f():\n    import ray.serve", "app.engine.engine -> ray.serve"),
        ("app.engine.engine", "if x:\n    from starlette.types import Scope", "app.engine.engine -> starlette.types"),
        ("app.diffusion.pipeline", "from app.engine import engine", "app.diffusion.pipeline -> app.engine.engine"),
        ("app.diffusion.models.unet", "from ray.util import tpu", "app.diffusion.models.unet -> ray.util"),
        ("app.diffusion.models.unet", "from ...engine import x", "app.diffusion.models.unet -> app.engine"),
        ("app.diffusion.models.deep.er", "from ....api import x", "app.diffusion.models.deep.er -> app.api"),
        ("app.diffusion.samplers.flow", "import scipy", "app.diffusion.samplers.flow -> scipy"),
        ("app.diffusion.samplers.flow", "def f():\n    import app.aot", "app.diffusion.samplers.flow -> app.aot"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, source: str, way: str) -> None:
    sound = {
        "app.__init__": "",
        "app.builders": "import ray\nfrom app.api.ingress import x",
        "app.api.ingress": "from app.api.protocol import x",
        "app.api.protocol": "from app.diffusion.samplers import SAMPLERS",
        "app.diffusion.images": "import jax" if "images" in source else "import PIL",
        "app.diffusion.models.unet": "import jax\nfrom app.diffusion.models import layers",
        "app.diffusion.pipeline": "import flax",
        "app.diffusion.samplers.__init__": "import numpy as np",
        "app.engine.engine": "from app.types import x",
        "app.serving.replica": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import app.diffusion.pipeline",
    }
    if module == "app.builders":
        sound["app.serving.replica"] = "from app.diffusion.pipeline import x"
    for name, text in sound.items():
        write(tmp_path, name, text)
    before = set(violations(tmp_path))
    write(tmp_path, module, source)
    assert way in set(violations(tmp_path)) - before


def write(root: Path, module: str, text: str) -> None:
    path = root / f"{module.replace('.', '/')}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_lazy_import_is_not_an_import_time_import(tmp_path: Path) -> None:
    write(tmp_path, "app.api.ingress", "import app.serving.replica")
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax\ndef f():\n    import jax"
    write(tmp_path, "app.serving.replica", text)
    assert "jax" not in chains(modules(tmp_path), "app.api.ingress")


def test_no_class_of_the_app_is_longer_than_200_lines() -> None:
    lines = {
        f"{file.relative_to(ROOT)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for file in (ROOT / "app").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert {name: count for name, count in lines.items() if count > 200} == {}
