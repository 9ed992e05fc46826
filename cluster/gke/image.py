"""The container image: the files, the environment and the packages that a cluster file brings to its nodes.

One image serves the head and the TPU nodes. It has no secrets: Kubernetes mounts those.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cluster.cli import UserError
from cluster.config.cluster_config import COMMANDS, ClusterConfig
from cluster.config.serve_config import ServeConfig

USER, UID = "ray", 1000
HOME = PurePosixPath("/home", USER)
KEYS_FOLDER = PurePosixPath("/etc/imagine")  # where Kubernetes mounts the file of API keys, and renews it
TOKEN = "auth_token"


@dataclass(frozen=True)
class Image:
    python: str  # version
    folder: PurePosixPath  # of the project
    requirements: str  # file
    files: Mapping[str, PurePosixPath]  # folders of the repository, and where they go
    environment: Mapping[str, str]
    keys: PurePosixPath  # where the application looks for the file of API keys
    ignored: tuple[str, ...]


def of(cluster: ClusterConfig, serve: ServeConfig) -> Image:
    """The image of a cluster file's nodes. Raises UserError where its commands are not like cluster.yaml's."""
    keys = keys_file(serve)
    files = {local: inside(target) for target, local in mounts(cluster) if local != keys}
    folder = next((target.parent for target in files.values() if target.name == "app"), HOME)
    commands = " ".join(commands_of(cluster))
    return Image(
        python=searched(r"uv venv .*--python (3\S+)", commands, cluster),
        folder=folder,
        requirements=searched(r"-r ~/\w+/(requirements/tpu\.txt)", commands, cluster),
        files=files,
        environment=exported(searched(r"export ([^']+)' > \S+/environment", commands, cluster)),
        keys=folder / inside(keys),
        ignored=tuple(cluster.document.at(("rsync_exclude",)) or ()),
    )


def mounts(cluster: ClusterConfig) -> Iterator[tuple[str, str]]:
    """The file mounts, apart from the token."""
    for target, local in (cluster.document.at(("file_mounts",)) or {}).items():
        if PurePosixPath(target).name == TOKEN:
            continue
        if local.startswith(("~", "/")):
            text = f"is {local}, and an image gets only files of the repository. Mount a volume there instead."
            raise UserError(str(cluster.document.error(("file_mounts", target), text)))
        yield target, local


def keys_file(serve: ServeConfig) -> str:
    """The file of API keys. Raises UserError without it, where applications have several, and with another secret."""
    names = set()
    for application in serve.image_applications:
        args = application.image_args()
        names.add(args.api_keys_file)
        if args.jobs.webhook_secret_file:  # the app wants a file of its own user's, and mounted ones are root's
            text = "must be null on Kubernetes, where no file that is mounted is readable by its owner alone."
            raise UserError(str(application.error(("args", "jobs", "webhook_secret_file"), text)))
    if len(names) != 1 or None in names:
        raise UserError(f"{serve.document.file} must have one args.api_keys_file: docs/opening-the-api.md")
    return str(names.pop())


def commands_of(cluster: ClusterConfig) -> Iterator[str]:
    for key in COMMANDS:
        yield from cluster.document.at((key,)) or ()


def searched(pattern: str, commands: str, cluster: ClusterConfig) -> str:
    if match := re.search(pattern, commands):
        return match[1]
    raise UserError(f"{cluster.document.file} has no command like cluster.yaml's with `{pattern}`.")


def exported(assignments: str) -> dict[str, str]:
    """NAME=value of an `export`, with the home filled in."""
    pairs = (word.partition("=") for word in shlex.split(assignments))
    return {name: value.replace("$HOME", str(HOME)) for name, _, value in pairs}


def inside(path: str) -> PurePosixPath:
    return PurePosixPath(path.replace("~", str(HOME), 1) if path.startswith("~") else path)


def dockerfile(image: Image, file: Path) -> str:
    environment = " \\\n    ".join(f"{name}={value}" for name, value in image.environment.items())
    own = f"COPY --chown={USER}"
    copies = [f"{own} {local} {target}" for local, target in image.files.items() if local != "requirements"]
    lines = [
        "# `make gke` writes this file. Build it in the repository's folder:",
        f"#   docker build -f {file} -t IMAGE .",
        f"FROM python:{image.python}-slim-bookworm",
        f"RUN useradd --create-home --uid {UID} {USER} \\",
        f"    && install -d {KEYS_FOLDER} {image.keys.parent} && install -d -o {USER} {image.folder} \\",
        f"    && ln -s {KEYS_FOLDER / image.keys.name} {image.keys}",
        f"USER {USER}",
        f"WORKDIR {image.folder}",
        f"{own} requirements {image.files['requirements']}",
        "RUN python -m venv .venv \\",
        f"    && .venv/bin/pip install --no-cache-dir --require-hashes -r {image.requirements}",
        *copies,
        f"ENV {environment}",
    ]
    return "\n".join(lines) + "\n"


def dockerignore(image: Image) -> str:
    """Of the repository only what the image takes."""
    lines = ["*", *(f"!{local}" for local in image.files), *(f"**/{name}" for name in image.ignored)]
    return "\n".join(lines) + "\n"
