"""A YAML file that knows the line of each of its keys, and what can be said about a line. Knows nothing of Ray."""

import difflib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.cli import UserError

Key = tuple[str | int, ...]  # the way from the top of a file: names and places in lists


@dataclass(frozen=True)
class Finding:
    file: str
    line: int
    text: str
    error: bool  # else it is advice

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {'error' if self.error else 'advice'}: {self.text}"


@dataclass(frozen=True)
class Document:
    file: str  # as it was named
    value: Any
    root: yaml.Node | None

    def error(self, key: Key, text: str) -> Finding:
        return Finding(self.file, self.line(key), f"{dotted(key)} {text}".lstrip(), error=True)

    def advice(self, key: Key, text: str) -> Finding:
        return Finding(self.file, self.line(key), f"{dotted(key)} {text}".lstrip(), error=False)

    def line(self, key: Key) -> int:
        """Of the key itself; where a part of it is not there, of what it would stand in."""
        node, line = self.root, 1
        for part in key:
            found = child(node, part)
            if found is None:
                break
            line, node = found
        return line

    def has(self, key: Key) -> bool:
        return not key or key[-1] in within(self.at(key[:-1]))

    def at(self, key: Key) -> Any:
        """What stands there, or None."""
        value = self.value
        for part in key:
            if part not in within(value):
                return None
            value = value[part]
        return value


def within(value: Any) -> Collection[object]:
    """The keys of a mapping, the places of a list."""
    return value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()


def child(node: yaml.Node | None, part: str | int) -> tuple[int, yaml.Node] | None:
    """The line and the node of one key of a mapping, or one item of a list."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == str(part):
                return name.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line + 1, node.value[part]
    return None


def read(path: Path) -> tuple[Document | None, list[Finding]]:
    """The file, if it is YAML, and what is wrong with it as such. Raises OSError."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = Document(str(path), yaml.safe_load(text), root)
    except UnicodeDecodeError as error:
        return None, [Finding(str(path), 1, f"it is not text in UTF-8: {error.reason}.", error=True)]
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        text = f"it is not YAML: {problem or ' '.join(str(error).split())}."
        return None, [Finding(str(path), mark.line + 1 if mark else 1, text, error=True)]
    return document, [
        Finding(str(path), line, f"{name} stands twice in one mapping, and only the last counts.", error=True)
        for name, line in repeated(root)
    ]


def repeated(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Keys that stand twice, which PyYAML lets pass."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for name, value in node.value:
            if name.value in seen:
                yield name.value, name.start_mark.line + 1
            seen.add(name.value)
            yield from repeated(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from repeated(value)


def dotted(key: Key) -> str:
    """('applications', 0, 'name') as applications[0].name"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def nearest(name: object, known: Iterable[str]) -> str:
    """' Did you mean x?', or nothing where no name is near."""
    names = [*known]
    longer = [one for one in names if one.startswith(f"{name}_")]
    near = difflib.get_close_matches(str(name), names, n=1) or longer
    return f" Did you mean {near[0]}?" if near else ""


def loaded(path: Path, absent: str) -> Any:
    """What a YAML file says, for a command that cannot go on without it; `absent` is said if there is no such file."""
    try:
        return yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(absent) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
