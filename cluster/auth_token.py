"""Makes and reads the token with which Ray authenticates clients of a cluster.

A local cluster has its own token in the run directory; remote clusters use the one in the user's home folder. Only the
path of a token is put into an environment, never the token, and neither into command lines or messages.
"""

import os
import re
import secrets
import stat
from pathlib import Path

from cluster import ownership
from cluster.cli import UserError

HOME = "~/.ray/auth_token"  # Ray's default
# Ray's variables for the token. The first one outranks the file, so it must be removed.
VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")


def create(path: Path) -> None:
    ownership.write(path, secrets.token_hex(32))


def environment(path: Path) -> dict[str, str]:
    """Variables with which Ray sends and requires this token."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def read_local(path: Path) -> str:
    """The token of a local cluster. Raises UserError if it is missing, damaged, or readable by others."""
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
    """Whether it is valid in a header. Otherwise http.client would quote it in an error."""
    return re.fullmatch(r"[!-~]+", token) is not None


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def of_this_process() -> tuple[str, str]:
    """The token that Ray sends from this process, and its source in words. The token is empty if Ray sends none."""
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
