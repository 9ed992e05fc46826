"""Refuses names that do not say what they hold: `python tests/check_names.py`, part of `make check`.

It reads every Python file of the repository and knows nothing of what the code does. pylint's `disallowed-name` takes
14 s for the same and misses keywords, import aliases, lambdas, `*args`, `:=` and patterns.
"""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFUSED = {"asked", "found", "given", "here", "one", "said", "theirs", "told"}
ADVICE = "name what it holds instead, such as sample, row or replica."


def names(node: ast.AST) -> Iterator[str]:
    """The names that a node makes. A name that it only reads was made elsewhere, perhaps in a library."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
            yield name
        case ast.arg(arg=name) | ast.keyword(arg=str(name)):
            yield name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)):
            yield name
        case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
            yield name


def refused(source: str) -> list[tuple[int, str]]:
    """Line and name of each refused name; underscores around it change nothing."""
    return sorted(
        (getattr(node, "lineno", 0), name)
        for node in ast.walk(ast.parse(source))
        for name in names(node)
        if name.strip("_") in REFUSED
    )


def python_files(root: Path) -> Iterator[str]:
    """Paths below `root`, without hidden folders and virtual environments."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name[0] != "." and not Path(folder, name, "pyvenv.cfg").exists()
        )
        yield from (Path(folder, name).relative_to(root).as_posix() for name in sorted(files) if name.endswith(".py"))


def problems(root: Path) -> list[str]:
    """A sentence for each refused name."""
    uses = [(path, line, name) for path in python_files(root) for line, name in refused((root / path).read_text())]
    return [f"{path}:{line}: {name}: {ADVICE}" for path, line, name in uses]


def main() -> None:
    sentences = problems(ROOT)
    print(*sentences, sep="\n", end="\n" if sentences else "")
    sys.exit(bool(sentences))


if __name__ == "__main__":
    main()
