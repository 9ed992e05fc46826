"""What a cluster elsewhere needs on this machine. Asked before anything is started, so before anything is paid for.

Each thing that is missing is one line that says what to do about it. Asks no cluster; of Google, only whether there are
credentials.
"""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.cli import UserError
from cluster.config.documents import load_yaml, read

PROGRAMS = {"ssh": "openssh-client", "rsync": "rsync"}  # and the packages of Debian and Ubuntu that bring them


def ready(path: Path) -> None:
    """Raises UserError with all that is missing for any verb."""
    if missing := [*lacks_programs(), *lacks_google(path, content(path))]:
        raise UserError("\n".join(missing))


def ready_to_start(path: Path) -> None:
    """The same for `up`, and the linter, which says more and costs seconds."""
    content(path)
    from cluster.config.lint import refuse_errors

    refuse_errors([path])
    if missing := [*lacks_programs(), *lacks_google(path, content(path)), *lacks_token()]:
        raise UserError("\n".join(missing))


def content(path: Path) -> dict[str, Any]:
    """A cluster file's. The linter says more about one that is not as it should be."""
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
