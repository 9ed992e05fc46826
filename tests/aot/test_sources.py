"""The files that a compiled program's key follows are derived from imports, so new device code cannot be left out."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app.aot.sources import HOST_ONLY, ROOT, imports, module_of, sources

ARRAYS = ("jax.numpy", "jax.lax", "jax.nn", "jax.random", "flax")  # what computes on a device


def names(root: Path = ROOT) -> list[str]:
    return [module_of(file, root) for file in sources(root)]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "app", tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


@pytest.mark.slow
def test_they_are_what_importing_the_pipeline_imports_but_for_what_stays_on_the_host() -> None:
    script = "import json, sys, app.diffusion.pipeline\n"
    script += "print(json.dumps([n for n in sys.modules if n.partition('.')[0] == 'app']))"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    imported = set(json.loads(out))
    later = set(names()) - (imported - HOST_ONLY)  # networks are imported where they are built
    assert imported - HOST_ONLY <= set(names()) and all(name.startswith("app.diffusion.models.") for name in later)
    assert HOST_ONLY <= imported
    assert {
        "app.diffusion.pipeline",
        "app.diffusion.device_programs",
        "app.diffusion.sharding",
        "app.diffusion.samplers.table",
        "app.diffusion.models",
        "app.diffusion.models.unet",
        "app.diffusion.models.loading",
    } <= set(names())


def test_nothing_on_the_host_only_list_computes_on_a_device() -> None:
    for name in HOST_ONLY:
        file = ROOT / name.replace(".", "/")
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        assert not [dotted for dotted in imports(file, name) if dotted.startswith(ARRAYS)], name
        used = {ast.unparse(node) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not [dotted for dotted in used if dotted.startswith(ARRAYS)], name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("models/unet.py", "from app.device_maths import twice"),
        ("models/unet.py", "from ...device_maths import twice"),
        ("pipeline.py", "import app.device_maths as maths"),
        ("samplers/table.py", "def later():\n    from app import device_maths"),
        ("models/__init__.py", "from app.device_maths import twice"),
    ],
)
def test_a_new_module_that_device_code_imports_is_followed(copy: Path, file: str, statement: str) -> None:
    (copy / "app/device_maths.py").write_text("from app.more_maths import x\n")
    (copy / "app/more_maths.py").write_text("x = 1\n")
    (copy / "app/unrelated.py").write_text("import app.diffusion.pipeline\n")
    before = names(copy)
    append(copy / "app/diffusion" / file, f"\n{statement}\n")
    assert set(names(copy)) - set(before) == {"app.device_maths", "app.more_maths"}


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import app.other"])
def test_what_device_code_does_not_import_is_not_followed(copy: Path, statement: str) -> None:
    before = names(copy)
    assert before == sorted(before) == names() and not {
        "app.engine.engine",
        "app.serving.replica",
        "app.api.ingress",
    } & set(before)
    (copy / "app/other.py").write_text("import app.diffusion.pipeline\n")
    append(copy / "app/diffusion/pipeline.py", f"\n{statement}\n")
    assert names(copy) == before


def test_they_are_found_without_importing_jax() -> None:
    script = "import sys; from app.aot.sources import sources; print(len(sources()), 'jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out == f"{len(names())} False\n"
