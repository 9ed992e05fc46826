"""Reads the small files of a checkpoint, its JSON and text. A problem is a sentence that names the file."""

import json
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs"
LFS_REMEDY = "is a pointer of Git LFS and not the file itself; fetch it with: git lfs pull"


def read_json(file: Path, where: str, problems: list[str], *, optional: bool = False) -> dict[str, Any]:
    """A JSON object, or {} where the file is missing or wrong. `where` is its name in problems."""
    text = read_text(file, where, problems, optional=optional)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{where} cannot be read: {error}.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{where} must hold a JSON object, got a {type(content).__name__}.")
        return {}
    return content


def read_text(file: Path, where: str, problems: list[str], *, optional: bool = False) -> str | None:
    try:
        content = file.read_bytes()
        if content.startswith(LFS_POINTER):
            problems.append(f"{where} {LFS_REMEDY}")
            return None
        return content.decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        if not optional:
            problems.append(f"{where} is missing.")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{where} cannot be read: {error}.")
    return None
