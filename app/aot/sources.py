"""The source files that a compiled program may depend on: app/diffusion/pipeline.py and all that it imports.

They are read from the sources, so every process on every machine gets the same files, whatever it has imported so far.
Every import counts, except under TYPE_CHECKING. A module that is imported under a computed name would be missed.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENTRY = "app.diffusion.pipeline"
# The pipeline imports these too, but nothing in them is part of a program: they keep programs, or measure them.
# Without this list every change of them would compile all programs again. A new module is never left out.
HOST_ONLY = {
    "app.aot",
    "app.aot.libtpu_flags",  # the flags themselves are in the key
    "app.aot.store",
    "app.aot.cache_key",
    "app.aot.compile",
    "app.aot.jax_internals",
    "app.aot.sources",
    "app.aot.program",
    "app.diffusion.calibration",  # what it measures reaches programs as arguments
    # Tables reach programs as arguments; what applies them is samplers/table.py.
    "app.diffusion.samplers",
    *(
        f"app.diffusion.samplers.{name}"
        for name in (
            "catalogue",
            "defaults",
            "dpm_solver",
            "dpmpp_sde",
            "first_order",
            "flow",
            "noise_levels",
            "noise_multistep",
            "plms",
            "prediction",
            "schedule",
        )
    ),
    "app.diffusion.timing",
}


def sources(root: Path = ROOT) -> list[Path]:
    """They are sorted by module name."""
    files = {module_of(file, root): file for file in sorted((root / ENTRY.partition(".")[0]).rglob("*.py"))}
    modules, pending = {ENTRY}, [ENTRY]
    while pending:
        module = pending.pop()
        for name in (*imports(files[module], module), *packages_of(module)):
            if name in files and name not in modules | HOST_ONLY:
                modules.add(name)
                pending.append(name)
    return [files[name] for name in sorted(modules)]


def module_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def packages_of(module: str) -> Iterator[str]:
    """The packages around a module. Their __init__.py runs too."""
    while module := module.rpartition(".")[0]:
        yield module


def imported_by(node: ast.Import | ast.ImportFrom, file: Path, module: str) -> Iterator[str]:
    """Dotted names of one statement in `module`. `from a import b` gives a and a.b, because b may be a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    parents = package[: len(package) - node.level + 1] if node.level else []
    source = ".".join([*parents, *([node.module] if node.module else [])])
    yield source
    yield from (f"{source}.{alias.name}" for alias in node.names)


def imports(file: Path, module: str) -> Iterator[str]:
    """Dotted names as imported."""
    pending: list[ast.AST] = [ast.parse(file.read_bytes())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported_by(node, file, module)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        else:
            pending.extend(ast.iter_child_nodes(node))
