"""Refuses names that do not say what they hold: `python tests/check_names.py`, part of `make check`.

It reads every Python file of the repository and knows nothing of what the code does. pylint's `disallowed-name` takes
14 s for the same and misses keywords, import aliases, lambdas, `*args`, `:=` and patterns.

Files that may still hold such names are listed in names_left.txt, which may only shrink.
"""

import argparse
import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT = "tests/names_left.txt"
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


def listed(root: Path) -> list[str]:
    """The lines of the list of files that may still hold such names; none where there is no list."""
    return (root / LEFT).read_text().splitlines() if (root / LEFT).exists() else []


def is_path(line: str) -> bool:
    return bool(line) and not line.startswith("#")


def problems(root: Path) -> list[str]:
    """A sentence for each refused name, and for each line that the list no longer needs."""
    excused = set(filter(is_path, listed(root)))
    by_file = {path: refused((root / path).read_text()) for path in python_files(root)}
    sentences = [
        f"{path}:{line}: {name}: {ADVICE}"
        for path, uses in by_file.items()
        if path not in excused
        for line, name in uses
    ]
    return sentences + [
        f"{LEFT}: {path} has no refused name any more. Delete its line (python tests/check_names.py --shrink)."
        for path in sorted(excused)
        if not by_file.get(path)
    ]


def shrink(root: Path) -> None:
    """Removes the lines that the list no longer needs, and the list once it names no file. It never adds a line."""
    kept = [
        line
        for line in listed(root)
        if not is_path(line) or ((root / line).exists() and refused((root / line).read_text()))
    ]
    if any(map(is_path, kept)):
        (root / LEFT).write_text("\n".join([*kept, ""]))
    else:
        (root / LEFT).unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shrink", action="store_true", help=f"first remove the lines that {LEFT} no longer needs")
    if parser.parse_args().shrink:
        shrink(ROOT)
    sentences = problems(ROOT)
    print(*sentences, sep="\n", end="\n" if sentences else "")
    sys.exit(bool(sentences))


if __name__ == "__main__":
    main()
