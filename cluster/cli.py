"""What every command of this repository shares: the errors it reports, its argument parser and its exit status.

Standard library only, so that any module can import it at no cost.
"""

import argparse
import errno
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# Errors of the file system that a user can mend. Any other OSError is a bug and keeps its traceback.
USER_CAN_MEND = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ELOOP}


class UserError(Exception):
    """A mistake of the user or a fault of the machine. The command prints this sentence and ends with exit_status."""

    exit_status = 1


class UsageError(UserError):
    """The command line, or a file that it names, is wrong."""

    exit_status = 2


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line. `hint` follows where the mistake is not in the value of one argument."""

    def __init__(self, description: str | None = None, *, hint: str = "", **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"prog": module_command(), "formatter_class": formatter, **options}, description=description)
        self.hint = hint or f"See: {self.prog} --help"

    def error(self, message: str) -> NoReturn:
        sentence = message.removeprefix("argument ")
        names_argument = sentence != message
        sentence = f"{sentence[:1].upper()}{sentence[1:].removesuffix('.')}."
        raise UsageError(sentence if names_argument else f"{sentence} {self.hint}")


def module_command() -> str | None:
    """`python -m cluster.deploy` if that is how this process was started."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else None


def nonempty(text: str) -> str:
    """Refuses what a shell makes of a variable that is not set; it would silently mean the default."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty.")
    return text


def path(text: str) -> Path:
    return Path(nonempty(text))


def integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}.") from None


def integer_between(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be an integer between {low} and {high}, got {text}.")
        return int(text)

    return parse


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}.")
    return value


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Ends the process with the exit status that the command returns. Prints an error as one line."""
    try:
        status = command()
    except UserError as error:
        fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        fail("Interrupted.", 130)
    except BrokenPipeError:  # `make logs | head`
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno not in USER_CAN_MEND or not error.filename:
            raise
        fail(f"{error.filename} cannot be read or written: {error.strerror}.", 1)
    sys.exit(status or 0)


def fail(sentence: str, exit_status: int) -> NoReturn:
    print(sentence, file=sys.stderr, flush=True)
    sys.exit(exit_status)
