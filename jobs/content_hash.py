"""What stands for a model that has no commit: the hash of what is loaded of it. Imports neither JAX nor Ray."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from app.diffusion.families.registry import FAMILIES
from app.diffusion.models.tokenizer_files import ALL_FILES
from app.diffusion.models.weight_files import weight_files
from jobs import hub


def content_hash(model: Path, variant: str | None = None) -> str:
    """The hash of all files that are loaded from a folder in diffusers layout, or of one file, in place of a commit.

    Files that are missing are the loader's concern.
    """
    if model.is_file():
        return f"file {hub.sha256_of(model)}"
    stems = {part: component.stem for family in FAMILIES for part, component in family.COMPONENTS.items()}
    weights = [model / part / name for part, stem in stems.items() for name in weights_in(model / part, stem, variant)]
    return files_hash(model, [*weights, *sorted([*model.glob("*/*.json"), *model.glob("tokenizer*/*.txt")])])


def weights_in(folder: Path, stem: str, variant: str | None) -> list[str]:
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return [name for name in weight_files(folder, names, stem, variant, []) if name in names]


def tokenizer_hash(folder: Path) -> str:
    """The hash of a tokenizer's files, wherever they are in a folder."""
    return files_hash(folder, sorted(file for file in folder.rglob("*") if file.name in ALL_FILES))


def files_hash(folder: Path, files: Iterable[Path]) -> str:
    hashes = "".join(f"{file.relative_to(folder)} {hub.sha256_of(file)}\n" for file in files)
    return f"files {hashlib.sha256(hashes.encode()).hexdigest()}"
