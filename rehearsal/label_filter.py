"""The filters of Compute Engine's lists that Ray uses: `(labels.a = b) AND ((status = X) OR (status = Y))`.

AND, OR, NOT, parentheses, `=` and `:*` for a key that is set (cloud.google.com/compute/docs/reference/rest/v1).
"""

import re
from collections.abc import Callable
from typing import Any

from rehearsal.refusal import Refusal

Json = dict[str, Any]
Test = Callable[[Json], bool]
TOKEN = re.compile(r"\s*(AND\b|OR\b|NOT\b|[()]|[\w.-]+\s*(?:=\s*[^\s()]+|:\*))")


def parse(text: str) -> Test:
    """The filter as a function of a resource. Raises Refusal where Google would not understand it."""
    tokens, position = [], 0
    while position < len(text.rstrip()):
        if not (match := TOKEN.match(text, position)):
            raise bad(text)
        tokens.append(match[1])
        position = match.end()
    test = _either(tokens)
    if tokens:
        raise bad(text)
    return test


def _either(tokens: list[str]) -> Test:
    tests = [_both(tokens)]
    while tokens[:1] == ["OR"]:
        tokens.pop(0)
        tests.append(_both(tokens))
    return lambda resource: any(test(resource) for test in tests)


def _both(tokens: list[str]) -> Test:
    tests = [_single(tokens)]
    while tokens[:1] == ["AND"]:
        tokens.pop(0)
        tests.append(_single(tokens))
    return lambda resource: all(test(resource) for test in tests)


def _single(tokens: list[str]) -> Test:
    token = tokens.pop(0) if tokens else ""
    if token == "NOT":
        inner = _single(tokens)
        return lambda resource: not inner(resource)
    if token == "(":
        inner = _either(tokens)
        if tokens[:1] != [")"]:
            raise bad("a parenthesis is not closed")
        tokens.pop(0)
        return inner
    if token.endswith(":*"):
        return lambda resource: _field(resource, token[:-2].strip()) is not None
    key, equals, value = (part.strip() for part in token.partition("="))
    if not equals:
        raise bad(token)
    return lambda resource: _field(resource, key) == value


def bad(text: str) -> Refusal:
    return Refusal(400, f"Invalid value for field 'filter': '{text}'. Invalid list filter expression.", "invalid")


def _field(resource: Json, path: str) -> object:
    value: Any = resource
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
