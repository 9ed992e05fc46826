"""The token by which a Ray cluster knows its owner: made, read, and put into what a client sends or inherits.

A local cluster has one of its own in the run directory; a cluster elsewhere has the one in the user's home. Nothing
here puts a token into an environment, a command line or a message: a client is told the file.
"""

import os
import re
import secrets
import stat
from pathlib import Path

from cluster import ownership
from cluster.cli import UserError

HOME = "~/.ray/auth_token"  # Ray's own place
# What a client's environment says of the token. The first outranks the file, so it must not stay where ours is meant.
VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")


def create(path: Path) -> None:
    ownership.write(path, secrets.token_hex(32))


def environment(path: Path) -> dict[str, str]:
    """By which Ray sends this token, and asks for it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def read_local(path: Path) -> str:
    """A local cluster's. Raises UserError where it is gone, damaged, another user's or open to others."""
    again = "To have the cluster made anew with a new one: make down up"
    try:
        token = ownership.read(path).strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        raise UserError(f"{path} is missing, the token that the local cluster asks for. {again}") from None
    except UnicodeDecodeError:
        token, mode = "", 0
    if mode & 0o077:
        raise UserError(f"{path} can be read by others on this machine, who may have the token now. {again}")
    if not plausible(token):
        raise UserError(f"{path} holds no token. {again}")
    return token


def plausible(token: str) -> bool:
    """Whether it can stand in a header; else http.client would quote it in an error."""
    return re.fullmatch(r"[!-~]+", token) is not None


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def of_this_process() -> tuple[str, str]:
    """The token that Ray would send from here, and where it stands, in words; no token where Ray sends none."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return "", "RAY_AUTH_MODE is not token"
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return (token, "RAY_AUTH_TOKEN") if plausible(token) else ("", "RAY_AUTH_TOKEN holds no token")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or HOME).expanduser()
    try:
        token = file.read_text().strip()
    except OSError as error:
        return "", f"{file} cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        token = ""
    return (token, str(file)) if plausible(token) else ("", f"{file} holds no token")
