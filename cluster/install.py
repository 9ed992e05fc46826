"""Makes .venv and installs requirements/LEVEL.txt into it, once for each content of that file.

It runs under the system's Python before anything is installed, so it imports only the standard library, and nothing of
this repository. Its syntax is that of Python 3.6, so that an old Python prints a message instead of a SyntaxError.
"""

import argparse
import contextlib
import fcntl
import getpass
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator  # noqa: UP035  (Python 3.6 has no other)

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
LEVELS = ("runtime", "dev", "gcp", "parity", "tpu", "cuda", "browser")  # each includes runtime
OLDEST, NEWEST = (3, 11), (3, 14)  # all pinned packages have wheels for these
LOG_EVERY_S = 10.0
# Settings of pip that say how it reaches packages. Others could make it install elsewhere, or nothing.
PIP_KEPT = (
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_TRUSTED_HOST", "PIP_PROXY"),
    *("PIP_CERT", "PIP_CLIENT_CERT", "PIP_USE_DEPRECATED", "PIP_USE_FEATURE", "PIP_KEYRING_PROVIDER"),
    *("PIP_CACHE_DIR", "PIP_NO_CACHE_DIR", "PIP_RETRIES", "PIP_TIMEOUT", "PIP_DEFAULT_TIMEOUT", "PIP_CONFIG_FILE"),
)


class InstallError(Exception):
    """Ends the command with this sentence. (cluster/cli.py has UserError, in newer syntax.)"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("level", choices=LEVELS)
    parser.add_argument("--venv", default=str(ROOT / ".venv"))
    parser.add_argument("--this-python", action="store_true", help="recreate it if another Python made it")
    arguments = parser.parse_args()
    try:
        install(Path(os.path.abspath(arguments.venv)), arguments.level, arguments.this_python)
    except InstallError as reason:
        sys.exit(str(reason))
    except OSError as error:
        if not error.filename:
            raise
        sys.exit(f"{error.filename} cannot be read or written: {error.strerror}. You are {user()}.")
    except KeyboardInterrupt:
        sys.exit("Interrupted. The next make goes on; what was downloaded is kept.")


def install(venv: Path, level: str, this_python: bool) -> None:
    if not why_recreate(venv, this_python) and current(venv, level):
        return
    with locked(venv):
        reason = why_recreate(venv, this_python)
        if not reason and current(venv, level):  # another make did it meanwhile
            return
        if reason or not venv.exists():
            make(venv, reason)
        unfinished(venv).touch()
        run_pip(venv, level)
        stamp(venv, level).write_text(fingerprint(level))
        unfinished(venv).unlink()


def why_recreate(venv: Path, this_python: bool) -> str:
    """Why an existing environment must be recreated; empty if it is usable, or if there is none."""
    if not venv.exists():
        return ""
    facts = settings(venv)
    if not facts and any(venv.iterdir()) and not unfinished(venv).exists():
        raise InstallError(f"{venv} is not a virtual environment. Move it out of the way.")
    version = tuple(int(part) for part in facts.get("version", facts.get("version_info", "0.0")).split(".")[:2])
    if unfinished(venv).exists():
        return "its last installation was interrupted"
    if not (venv / "bin" / "python").exists():
        return "the Python that made it is gone"
    if "command" in facts and not same(facts["command"].rpartition(" -m venv ")[2], venv):
        return "it was made in another folder"
    if not (venv / "bin" / "pip").exists():
        return "it has no pip"
    if not OLDEST <= version <= NEWEST:
        return f"{python(version)} made it"
    if this_python and version != sys.version_info[:2]:
        return f"{python(version)} made it, and {python(sys.version_info[:2])} is asked for"
    return ""


def settings(venv: Path) -> "dict[str, str]":
    try:
        lines = (venv / "pyvenv.cfg").read_text().splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}


def same(options_and_path: str, venv: Path) -> bool:
    """Whether `python -m venv OPTIONS PATH` made this folder, whatever spelling PATH has."""
    if options_and_path.endswith(str(venv)):
        return True
    path = Path(options_and_path.split(" ")[-1])
    return path.exists() and path.samefile(venv)


def stamp(venv: Path, level: str) -> Path:
    return venv / f".installed-{level}"


def unfinished(venv: Path) -> Path:
    return venv / ".unfinished"


def current(venv: Path, level: str) -> bool:
    """Whether this level is installed as in its file. Every level includes runtime."""
    for candidate in LEVELS if level == "runtime" else (level,):
        if stamp(venv, candidate).exists() and stamp(venv, candidate).read_text() == fingerprint(candidate):
            return True
    return False


def fingerprint(level: str) -> str:
    files = [REQUIREMENTS / f"{name}.txt" for name in ("runtime", level)]
    try:
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    except OSError as error:
        raise InstallError(f"{error.filename} cannot be read: {error.strerror}.") from None


def complaint(version: "tuple[int, int]") -> str:
    """What is wrong with the running Python, and the remedy; empty if nothing."""
    if not OLDEST <= version <= NEWEST:
        names = [f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]
        candidates = [name for name in names if shutil.which(name)] or names
        return (
            f"{python(OLDEST)} to {python(NEWEST)} is needed, and this is {python(version)}. "
            f"Name another one: make PYTHON={candidates[0]} ..."
        )
    for module in ("venv", "ensurepip"):
        if not importlib.util.find_spec(module):
            package = f"python{version[0]}.{version[1]}-venv"
            return f"This Python has no module {module}. On Debian or Ubuntu: apt install {package}"
    return ""


def python(version: "tuple[int, ...]") -> str:
    return "Python " + ".".join(map(str, version))


@contextlib.contextmanager
def locked(venv: Path) -> "Iterator[None]":
    with open(str(venv) + ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another make that is installing.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(venv: Path, reason: str) -> None:
    problem = complaint(sys.version_info[:2])
    if problem:
        raise InstallError(problem)
    if reason:
        say(f"Recreating {venv.name}: {reason}.")
        shutil.rmtree(str(venv))
    else:
        say(f"Making {venv.name} with {python(sys.version_info[:2])}")
    venv.mkdir(parents=True)
    unfinished(venv).touch()
    command = [sys.executable, "-m", "venv", str(venv)]
    made = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode:
        raise InstallError("The environment could not be made. " + made.stdout.decode(errors="replace").strip())


def run_pip(venv: Path, level: str) -> None:
    file = REQUIREMENTS / f"{level}.txt"
    total = sum(1 for line in file.read_text().splitlines() if "==" in line and line[0].isalnum())
    say(f"Installing requirements/{level}.txt ({total} packages; minutes the first time)")
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "-r", str(file)]
    command += ["--no-compile"]  # compiling takes minutes on two cores, and most modules are never imported
    began = shown = time.monotonic()
    collected, errors, unreachable = 0, [], False
    live = sys.stdout.isatty()
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
    ) as pip:
        for line in pip.stdout or ():
            words = line.split()
            if words[:1] == ["Collecting"] or line.startswith("Requirement already satisfied"):
                collected += 1
                state = f"{collected} of {total}  {words[1] if words[0] == 'Collecting' else words[3]}"
            elif line.startswith("Installing collected"):
                state = f"unpacking {line.count(',') + 1} packages"
            else:
                unreachable |= "Retrying" in line
                errors += [line.strip()] if line.startswith("ERROR:") else []
                continue
            if live or time.monotonic() - shown >= LOG_EVERY_S or state.startswith("unpacking"):
                shown = time.monotonic()
                text = f"{shown - began:6.0f} s  {state}"
                print("\r\033[K" + text if live else text, end="" if live else "\n", flush=True)
    if live:
        print("\r\033[K", end="")
    if pip.returncode:
        why = ["The package index cannot be reached."] if unreachable else []
        raise InstallError(
            " ".join(["The installation failed."] + why + errors[:1] + ["To go on, run the same make again."])
        )
    say(f"Installed in {time.monotonic() - began:.0f} s")


def environment() -> "dict[str, str]":
    """The user's environment without variables that redirect Python or pip."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PIP_")) or name in ("PYTHON", "PYTHONUTF8", *PIP_KEPT)
    }


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, a user may have a number and no name
        return f"user {os.getuid()}"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
