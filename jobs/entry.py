"""What the jobs share: how they read a command line, where their relative paths start, and how they end."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cluster import terminal


class Parser(argparse.ArgumentParser):
    """A mistake is one line and exit status 2."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        print(message.removeprefix("argument "), file=sys.stderr, flush=True)
        sys.exit(2)


class Invalid(ValueError):
    """An argument that only a look at files could show to be wrong: this sentence, and exit status 2."""


def path(text: str) -> Path:
    """Relative to where the cluster has the repository; without a cluster, to where we are."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or folder, got nothing.")
    home = Path(os.environ.get("IMAGINE_HOME", ".")).expanduser()
    return (home / Path(text).expanduser()).absolute()


def whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be an integer between {low} and {high}, got {text}.")
        return int(text)

    return parse


def run(job: Callable[[], str]) -> NoReturn:
    """Ends the process as the job ends. What the job returns says what it made and where. A stop, which is a SIGTERM,
    lets it clean up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    terminal.run(lambda: tell(job))


def tell(job: Callable[[], str]) -> None:
    began = time.monotonic()
    try:
        made = job()
    except Invalid as mistake:
        print(mistake, file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:
        raise
    except OSError as error:  # a folder that may not be written, a disk that is full
        where = f"{error.filename}: " if error.filename else ""
        raise terminal.Stop(f"{where}{error.strerror or error}.") from None
    terminal.say(f"{made} It took {terminal.span(time.monotonic() - began)}.")
