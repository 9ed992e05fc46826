"""Downloads files of a Hugging Face repo at one commit, and checks the hash that the Hub declares for each.

Finished files stay in the cache of the Hub's client, so an interrupted download resumes with the first missing file.
HF_ENDPOINT names another Hub, and HF_TOKEN a token; this module stores neither.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub

from app.diffusion.models.checkpoint_files import INDEX
from app.diffusion.models.errors import one_line
from app.diffusion.models.hub_files import checkpoint_names
from app.diffusion.models.small_files import read_json
from cluster.cli import UserError
from cluster.terminal import say


@dataclasses.dataclass(frozen=True)
class Snapshot:
    folder: Path
    commit: str


def download(repo: str, revision: str | None, variant: str | None) -> Snapshot:
    """Fetches the files that loading reads.

    Raises UserError if the Hub does not answer, has no such repo, or sends bytes with another hash; or if the repo
    lacks weights.
    """
    problems: list[str] = []
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
        assert info.sha and info.siblings is not None
        index = huggingface_hub.hf_hub_download(repo, INDEX, revision=info.sha)
        files = {file.rfilename: file for file in info.siblings}
        names = checkpoint_names(files, read_json(Path(index), INDEX, problems), variant, problems)
        if problems:
            raise UserError("\n".join([f"{repo} cannot be loaded:", *(f"- {problem}" for problem in problems)]))
        wanted = [files[name] for name in names]
        size = sum(file.size or 0 for file in wanted)
        say(f"{repo} at {info.sha}: {len(wanted)} files, {size / 1e6:,.1f} MB")
        folder = huggingface_hub.snapshot_download(
            repo, revision=info.sha, allow_patterns=[file.rfilename for file in wanted], max_workers=8
        )
    except UserError:
        raise
    except Exception as error:  # the Hub's client raises a dozen kinds
        raise UserError(f"{repo} cannot be fetched: {one_line(error)}") from None
    for file in wanted:
        check(Path(folder) / file.rfilename, file)
    return Snapshot(Path(folder), info.sha)


def check(file: Path, declared: Any) -> None:
    """Checks the SHA-256 of a large file, and the git blob id of a small one. Removes a damaged file from the cache."""
    if declared.lfs:
        got, wanted = sha256_of(file), declared.lfs.sha256
    else:
        content = file.read_bytes()
        got, wanted = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), declared.blob_id
    if got != wanted:
        file.resolve().unlink()
        file.unlink(missing_ok=True)
        raise UserError(
            f"{declared.rfilename} has the hash {got}, and the Hub declares {wanted}. The same job fetches it anew."
        )


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
