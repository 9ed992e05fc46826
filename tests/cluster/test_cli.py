"""cluster/cli.py: one line and the right exit status for every mistake."""

import argparse
import errno
from collections.abc import Callable

import pytest

from cluster.cli import Parser, UsageError, UserError, integer, integer_between, nonempty, number, run_command


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (UserError("The cluster is down."), "The cluster is down.\n", 1),
        (UsageError("--rate must be above 0."), "--rate must be above 0.\n", 2),
        (KeyboardInterrupt(), "Interrupted.\n", 130),
        (OSError(errno.EACCES, "Permission denied", "/run"), "/run cannot be read or written: Permission denied.\n", 1),
    ],
)
def test_a_mistake_is_one_line_and_its_exit_status(
    error: BaseException, line: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(raising(error))
    assert end.value.code == status and capsys.readouterr() == ("", line)


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.ENOENT, "No such file", "/run")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_command(raising(error))


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_a_command_returns_its_exit_status(returned: int | None, status: int) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(lambda: returned)
    assert end.value.code == status


def test_the_parser_names_the_argument_and_its_range() -> None:
    parser = Parser("What it does.", prog="python -m something")
    parser.add_argument("--count", type=integer_between(1, 9))
    parser.add_argument("--rate", type=number)
    parser.add_argument("--to", type=nonempty)
    parser.add_argument("--seed", type=integer)
    for words, sentence in (
        (["--count", "10"], "--count: must be an integer between 1 and 9, got 10."),
        (["--count", "-1"], "--count: must be an integer between 1 and 9, got -1."),
        (["--rate", "nan"], "--rate: must be a number, got 'nan'."),
        (["--to", ""], "--to: must not be empty."),
        (["--seed", "x"], "--seed: must be a whole number, got 'x'."),
        (["--other"], "Unrecognized arguments: --other. See: python -m something --help"),
    ):
        with pytest.raises(UsageError) as refusal:
            parser.parse_args(words)
        assert str(refusal.value) == sentence


def test_a_parser_shows_its_description_as_it_is_written() -> None:
    text = "Does this:\n\n    python -m something --rate 1"
    assert text in Parser(text).format_help()
    assert isinstance(Parser(text), argparse.ArgumentParser)
