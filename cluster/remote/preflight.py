"""Checks what a remote cluster needs on this machine, before anything is started that costs money.

Each missing thing is one line with its remedy. Contacts no cluster, and Google only for credentials.
"""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.cli import UserError
from cluster.config.documents import load_yaml, read

PROGRAMS = {"ssh": "openssh-client", "rsync": "rsync"}  # program -> package of Debian and Ubuntu


def ready(path: Path) -> None:
    """Raises UserError with all that is missing for the verbs of a remote cluster."""
    if missing := [*lacks_programs(), *lacks_google(path, content(path))]:
        raise UserError("\n".join(missing))


def ready_to_start(path: Path) -> None:
    """Checks for `up`: also the token and the linter, which takes seconds."""
    content(path)
    from cluster.config.lint import refuse_errors

    refuse_errors([path])
    if missing := [*lacks_programs(), *lacks_google(path, content(path)), *lacks_token()]:
        raise UserError("\n".join(missing))


def content(path: Path) -> dict[str, Any]:
    """The content of a cluster file. Checks only what the verbs need; the linter checks all."""
    cluster = load_yaml(path, f"There is no cluster file {path}. Name one that there is: CLUSTER=cluster.yaml")
    provider = cluster.get("provider") if isinstance(cluster, dict) else None
    if not isinstance(provider, dict) or not provider.get("type") or not cluster.get("cluster_name"):
        raise UserError(f"{path} must have a cluster_name and a provider with a type, as files for `ray up` do.")
    return dict(cluster)


def lacks_programs() -> Iterator[str]:
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            yield f"{program} is not installed, and Ray's launcher needs it: sudo apt-get install {package}"


def lacks_google(path: Path, cluster: dict[str, Any]) -> Iterator[str]:
    provider = cluster["provider"]
    if provider["type"] != "gcp":
        return
    if not provider.get("project_id"):
        document, _ = read(path)
        line = document.line(("provider", "project_id")) if document else 1
        yield f"{path}:{line}: provider.project_id must be the id of your Google Cloud project, and is not set."
    if not find_spec("googleapiclient"):
        yield "Google's client for Python is not installed: make gcp"
    elif not provider.get("gcp_credentials"):
        yield from lacks_credentials()


def lacks_credentials() -> Iterator[str]:
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    try:
        google.auth.default()
    except DefaultCredentialsError as error:
        words = str(error).partition(". ")[0]
        yield f"Google's credentials are missing ({words}): gcloud auth application-default login"


def lacks_token() -> Iterator[str]:
    file = token_file()
    if not file.exists():
        yield (
            f"{file} is missing, the token that the cluster will ask its callers for. To make one: "
            "(umask 077 && .venv/bin/ray get-auth-token --generate > /dev/null)"
        )
    elif not file.read_text(errors="replace").strip():
        yield f"{file} is empty. Remove it and make the cluster's token: ray get-auth-token --generate > /dev/null"
    elif file.stat().st_mode & 0o077:
        yield f"{file} can be read by others on this machine: chmod 600 {file}"


def token_file() -> Path:
    return Path.home() / ".ray" / "auth_token"
