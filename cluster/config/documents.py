"""YAML files whose keys know their lines, and findings about such a line. Knows nothing of Ray, Serve or clusters."""

import difflib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.cli import UserError

QUICK = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times quicker; its errors have other words
Key = tuple[str | int, ...]  # the path from the top of a file: names in mappings, indices in lists


@dataclass(frozen=True)
class Finding:
    """A sentence about one line of a file: an error, or advice."""

    file: str
    line: int
    text: str
    error: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {'error' if self.error else 'advice'}: {self.text}"


@dataclass(frozen=True)
class Document:
    """The content of a YAML file, with the line of each key."""

    file: str  # the path as the user wrote it
    value: Any
    root: yaml.Node | None

    def error(self, key: Key, text: str) -> Finding:
        return Finding(self.file, self.line(key), f"{dotted(key)} {text}".lstrip(), error=True)

    def advice(self, key: Key, text: str) -> Finding:
        return Finding(self.file, self.line(key), f"{dotted(key)} {text}".lstrip(), error=False)

    def line(self, key: Key) -> int:
        """The line of a key. For a missing key it is the line of the innermost parent that exists."""
        node, line = self.root, 1
        for part in key:
            entry = child(node, part)
            if entry is None:
                break
            line, node = entry
        return line

    def has(self, key: Key) -> bool:
        return not key or key[-1] in keys_of(self.at(key[:-1]))

    def at(self, key: Key) -> Any:
        """The value of a key, or None."""
        value = self.value
        for part in key:
            if part not in keys_of(value):
                return None
            value = value[part]
        return value

    def mappings(self, key: Key) -> Iterator[Key]:
        """The keys of those items of a list that are mappings; none if the value is no list."""
        value = self.at(key)
        for i, item in enumerate(value if isinstance(value, list) else ()):
            if isinstance(item, dict):
                yield (*key, i)


@dataclass(frozen=True)
class Section:
    """A part of a document. Keys are relative to it."""

    document: Document
    key: Key

    def at(self, *key: str | int) -> Any:
        return self.document.at((*self.key, *key))

    def error(self, key: Key, text: str) -> Finding:
        return self.document.error((*self.key, *key), text)

    def advice(self, key: Key, text: str) -> Finding:
        return self.document.advice((*self.key, *key), text)


def keys_of(value: Any) -> Collection[object]:
    """The keys of a mapping, the indices of a list, and nothing of any other value."""
    return value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()


def child(node: yaml.Node | None, part: str | int) -> tuple[int, yaml.Node] | None:
    """The line and the node of one key of a mapping, or of one item of a list."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == str(part):
                return name.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line + 1, node.value[part]
    return None


def read(path: Path) -> tuple[Document | None, list[Finding]]:
    """The document, if the file is YAML, and findings about the file as such. Raises OSError."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = Document(str(path), yaml.load(text, Loader=QUICK), root)
    except UnicodeDecodeError as error:
        return None, [Finding(str(path), 1, f"it is not text in UTF-8: {error.reason}.", error=True)]
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        text = f"it is not YAML: {problem or ' '.join(str(error).split())}."
        return None, [Finding(str(path), mark.line + 1 if mark else 1, text, error=True)]
    return document, [
        Finding(str(path), line, f"{name} appears twice in one mapping, and only the last one counts.", error=True)
        for name, line in duplicate_keys(root)
    ]


def read_with(path: Path, key: str, kind: str) -> Document:
    """The document of a file that has this key at the top. Raises UserError where there is no such document."""
    try:
        document, findings = read(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    refuse(findings)
    assert document is not None
    if not document.has((key,)):
        raise UserError(f"{path} has no {key}, so it is no {kind}.")
    return document


def refuse(findings: Iterable[Finding]) -> None:
    """Raises UserError with the errors among these findings, if there are any."""
    if errors := [str(finding) for finding in findings if finding.error]:
        raise UserError("\n".join(errors))


def duplicate_keys(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Keys that a mapping has twice, which PyYAML accepts."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for name, value in node.value:
            if name.value in seen:
                yield name.value, name.start_mark.line + 1
            seen.add(name.value)
            yield from duplicate_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from duplicate_keys(value)


def dotted(key: Key) -> str:
    """('applications', 0, 'name') as applications[0].name"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """' Did you mean x?' with the most similar known name, or an empty text if none is similar."""
    names = [*known]
    longer = [candidate for candidate in names if candidate.startswith(f"{name}_")]
    similar = difflib.get_close_matches(str(name), names, n=1) or longer
    return f" Did you mean {similar[0]}?" if similar else ""


def load_yaml(path: Path, missing: str) -> Any:
    """The content of a YAML file, without lines. Raises UserError, with the text of `missing` if there is no file."""
    try:
        return yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
