"""Which files of a Hugging Face repo loading reads, and their download. Imports no JAX.

A repo holds the same weights many times: in variants, pickled, for ONNX and Flax. Nothing but what loads is fetched.
"""

import glob
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.diffusion.families.registry import recognise
from app.diffusion.models.checkpoint_files import INDEX, SCHEDULER
from app.diffusion.models.errors import one_line
from app.diffusion.models.small_files import read_json
from app.diffusion.models.tokenizer_files import ALL_FILES
from app.diffusion.models.weight_files import choose, missing, variant_problems

logger = logging.getLogger(f"ray.serve.{__name__}")  # the tree that Serve writes to its files


def download(repo: str, revision: str | None, variant: str | None) -> tuple[Path, str]:
    """The folder of a repo's files in the Hub's cache, and why the Hub could not be asked, or "".

    Without the Hub, it is what an earlier download left there. Raises ValueError where that is nothing, or where the
    repo lacks weights.
    """
    import huggingface_hub

    try:
        names, commit = names_in(repo, revision)
        file = huggingface_hub.hf_hub_download(repo, INDEX, revision=commit) if INDEX in names else None
    except Exception as error:  # the Hub's client raises a dozen classes; each means that it did not answer
        return cached(repo, revision, error)
    problems: list[str] = []
    index = read_json(Path(file or INDEX), INDEX, problems)
    wanted = checkpoint_names(names, index, variant, problems) if index else []
    if problems:
        raise ValueError("\n".join([f"model {repo} cannot be loaded:", *(f"- {problem}" for problem in problems)]))
    return fetch(repo, revision, wanted)


def download_tokenizer(repo: str) -> tuple[Path, str]:
    """The same of a repo's tokenizers."""
    try:
        names, _ = names_in(repo, None)
    except Exception as error:
        return cached(repo, None, error)
    return fetch(repo, None, tokenizer_names(names))


def names_in(repo: str, revision: str | None) -> tuple[list[str], str | None]:
    """The paths of all files, and the commit of the revision."""
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=10)
    return [file.rfilename for file in info.siblings or ()], info.sha


def fetch(repo: str, revision: str | None, names: Iterable[str]) -> tuple[Path, str]:
    import huggingface_hub

    try:
        patterns = [*map(glob.escape, names)]
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns)), ""
    except Exception as error:
        return cached(repo, revision, error)


def cached(repo: str, revision: str | None, reason: Exception) -> tuple[Path, str]:
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception:
        raise ValueError(
            f"model {repo} is no folder here and could not be fetched from Hugging Face: {one_line(reason)}"
        ) from reason
    logger.warning(f"{repo} is loaded from this machine's cache, as the Hub could not be asked: {one_line(reason)}")
    return folder, one_line(reason)


def cached_folder(repo: str, revision: str | None, names: Sequence[str]) -> Path | None:
    """The folder of a repo that was downloaded from the Hub to this machine, by a file that it has."""
    import huggingface_hub  # takes a second

    for name in names:
        file = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(file, str):
            return Path(file.removesuffix(name))
    return None


def checkpoint_names(
    names: Collection[str], index: Mapping[str, Any], variant: str | None, problems: list[str]
) -> list[str]:
    """Of a repo's files, by paths, those that loading reads. Weights that are not there are a problem."""
    kind = recognise(index, problems)
    if kind is None:
        return []
    wanted = [INDEX, SCHEDULER, *(f"{part}/config.json" for part in kind.COMPONENTS)]
    wanted += [f"{name}/{file}" for name in kind.TOKENIZERS for file in ALL_FILES]
    weights = []
    for part, component in kind.COMPONENTS.items():
        inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        chosen = choose(inside, component.stem, variant)
        if not chosen:
            problems.append(missing(f"{part}/{component.stem}", inside, component.stem))
        weights += [f"{part}/{name}" for name in chosen]
    problems += variant_problems(weights, variant)
    return [name for name in wanted if name in names] + weights


def tokenizer_names(names: Collection[str]) -> list[str]:
    """Of a repo's files those of its tokenizers, which are in folders of that name or else at the top."""
    inside = [name for name in names if name.startswith("tokenizer") and name.partition("/")[2] in ALL_FILES]
    return inside or [name for name in names if name in ALL_FILES]
