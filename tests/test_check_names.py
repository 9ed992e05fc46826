"""Each kind of name that `make check` refuses, and how the list of files that may still hold some shrinks."""

from pathlib import Path

import pytest

from tests.check_names import problems, python_files, refused

KINDS = {
    "variable": "one = 1",
    "annotated variable": "one: int = 1",
    "part of a tuple": "a, (*one, b) = x",
    "attribute": "self.one = 1",
    "attribute of a class": "class A:\n    one: int",
    "function": "def one(): ...",
    "coroutine": "async def one(): ...",
    "method": "class A:\n    def one(self): ...",
    "class": "class one: ...",
    "parameter": "def f(one): ...",
    "keyword parameter": "def f(*, one=1): ...",
    "rest of the parameters": "def f(*one): ...",
    "rest of the keywords": "def f(**one): ...",
    "parameter of a lambda": "lambda one: 1",
    "keyword": "f(one=1)",
    "loop": "for one in x: ...",
    "comprehension": "[y for one in x]",
    "generator": "f(y for one, y in x)",
    "with": "with x as one: ...",
    "except": "try: ...\nexcept ValueError as one: ...",
    "import": "import x as one",
    "import of a name": "from x import y as one",
    "walrus": "f(one := 1)",
    "pattern": "match x:\n    case [one]: ...",
    "pattern with as": "match x:\n    case [] as one: ...",
    "pattern's star": "match x:\n    case [*one]: ...",
    "pattern's mapping": "match x:\n    case {**one}: ...",
    "with underscores": "_one_ = 1",
}


@pytest.mark.parametrize("source", KINDS.values(), ids=KINDS.keys())
def test_each_kind_of_name_is_refused_once_with_its_line(source: str) -> None:
    line = next(number for number, text in enumerate(source.splitlines(), 1) if "one" in text)
    name = "_one_" if "_one_" in source else "one"
    assert refused(source) == [(line, name)]


@pytest.mark.parametrize(
    "source", ["print(x.found, one)", "from x import one", "f('one', {'told': 1})", "everyone = 1"]
)
def test_what_others_named_and_longer_names_pass(source: str) -> None:
    assert refused(source) == []


def test_a_problem_says_file_line_name_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\ntold = 2\n")
    [problem] = problems(tmp_path)
    assert problem.startswith("a.py:2: told: name what it holds")


def test_hidden_folders_and_virtual_environments_are_not_read(tmp_path: Path) -> None:
    for folder in ("app", ".cache", "env/lib"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").touch()
    (tmp_path / "env/pyvenv.cfg").touch()
    assert list(python_files(tmp_path)) == ["app/a.py"]
