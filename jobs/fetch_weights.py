"""Puts a checkpoint into a folder that replicas load from: bf16 safetensors, verified, with a manifest.

    python -m jobs.fetch_weights CompVis/stable-diffusion-v1-4 --out weights/sd14
    python -m jobs.fetch_weights stabilityai/sdxl-turbo --variant fp16 --out weights/turbo
    python -m jobs.fetch_weights assets/demo-model --out weights/demo          # a folder in diffusers layout

The source goes through the loader that replicas use, which reports all its problems. What is written is read back, and
each tensor is compared with the source bit for bit. The folder gets its name when it is whole. model_index.json is
written last, because nothing loads a folder without it. Run again, the job checks what is present.
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from app.diffusion.models.checkpoint_files import read_folder
from app.diffusion.models.loading import Checkpoint, load_checkpoint
from app.diffusion.models.tensors import finite, to_tensors
from app.diffusion.models.weight_files import Tensor, find_tensors
from cluster.cli import Parser, UsageError, UserError
from cluster.terminal import say
from jobs import hub
from jobs.content_hash import content_hash
from jobs.entry import path, run

DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
INDEX, MANIFEST = "model_index.json", "manifest.json"
STALE_S = 3600  # an unfinished folder that is older was left by a killed run


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of the tensors, as the manifest names it."""

    folder: Path
    name: str
    revision: str | None
    variant: str | None


def main() -> str:
    parser = Parser(__doc__)
    parser.add_argument("model", help="a Hugging Face repo id, or a folder in diffusers layout")
    parser.add_argument("--revision", help="branch, tag or commit of a repo id; the manifest keeps the commit (main)")
    parser.add_argument("--variant", help="of the files with weights, such as fp16 (files without one)")
    parser.add_argument("--out", type=path, required=True, help="the folder to make, on a disk that replicas see")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the tensors (%(default)s)")
    args = parser.parse_args()
    source = source_of(args.model, args.revision, args.variant)
    wanted = {"source": source.name, "revision": source.revision, "variant": args.variant, "dtype": args.dtype}
    if (args.out / MANIFEST).is_file():
        finish(args.out, wanted, source)
        return f"{args.out} was there already, and all its files have the hashes of its manifest."
    if args.out.exists():
        raise UsageError(f"--out: {args.out} is there and no work of this job, as it has no {MANIFEST}.")
    make(source, args.out, args.dtype, wanted)
    files = manifest_of(args.out)["files"]
    size = sum(file["bytes"] for file in files.values()) / 1e6
    return f"Made {args.out}: {len(files)} files, {size:,.1f} MB, {args.dtype}. Deploy it with `model: {args.out}`."


def source_of(model: str, revision: str | None, variant: str | None) -> Source:
    if path(model).is_dir():
        if revision:
            raise UsageError(f"--revision is of a repo id, and {model} is a folder.")
        return Source(path(model), str(path(model)), content_hash(path(model), variant), variant)
    if path(model).is_file():
        raise UsageError(f"model must be a folder or a repo id. {model} is one file: copy it, and deploy it as it is.")
    # A typing mistake in a path must not start a download.
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) and not path(model).parent.is_dir():
        snapshot = hub.download(model, revision, variant)
        return Source(snapshot.folder, model, snapshot.commit, variant)
    raise UsageError(f"model must be a folder in diffusers layout or a Hugging Face repo id, got {model}.")


def make(source: Source, out: Path, dtype: str, wanted: dict[str, Any]) -> None:
    try:
        checkpoint = load_checkpoint(source.folder, variant=source.variant, dtype=DTYPES[dtype])
    except ValueError as problems:
        raise UserError(str(problems)) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    clear_stale(out)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.unfinished-", dir=out.parent))
    try:
        copy_small(source.folder, unfinished, ["scheduler", *checkpoint.networks, *checkpoint.tokenizers])
        files = read_folder(source.folder, source.variant, [])
        assert files  # as it has just been loaded
        for part, component in files.kind.COMPONENTS.items():
            write_part(part, component.stem, checkpoint, unfinished, dtype)
            verify_part(part, component.stem, files.weights(part, checkpoint.family), unfinished, dtype)
        facts = {
            str(file.relative_to(unfinished)): {"bytes": file.stat().st_size, "sha256": hub.sha256_of(file)}
            for file in sorted(file for file in unfinished.rglob("*") if file.is_file())
        }
        made = {**wanted, "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "files": facts}
        (unfinished / MANIFEST).write_text(json.dumps(made, indent=2) + "\n")
        (unfinished / INDEX).unlink()
        unfinished.chmod(0o755)  # mkdtemp allows its user alone, and replicas may have another
        os.rename(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    finish(out, wanted, source)


def clear_stale(out: Path) -> None:
    for left in out.parent.glob(f".{out.name}.unfinished-*"):
        if left.stat().st_mtime < time.time() - STALE_S:
            shutil.rmtree(left, ignore_errors=True)


def copy_small(source: Path, unfinished: Path, parts: Iterable[str]) -> None:
    """Copies configuration files, from the known parts alone."""
    shutil.copyfile(source / INDEX, unfinished / INDEX)
    for part in parts:
        (unfinished / part).mkdir()
        for file in (source / part).iterdir():
            if file.is_file() and file.suffix in (".json", ".txt", ".jinja") and ".index." not in file.name:
                shutil.copyfile(file, unfinished / part / file.name)


def write_part(part: str, stem: str, checkpoint: Checkpoint, unfinished: Path, dtype: str) -> None:
    tensors = to_tensors(checkpoint.networks[part], DTYPES[dtype])
    if bad := [name for name, tensor in tensors.items() if not finite(tensor)]:
        raise UserError(f"{part}: tensor {bad[0]} holds a number that is not finite in {dtype}.")
    file = unfinished / part / f"{stem}.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})  # as diffusers and transformers ask for
    say(f"{part}: {len(tensors)} tensors, {file.stat().st_size / 1e6:,.1f} MB")


def verify_part(part: str, stem: str, source_tensors: Mapping[str, Tensor], unfinished: Path, dtype: str) -> None:
    """Compares the written tensors with the source's, both read from the disk without our modules."""
    problems: list[str] = []
    written = find_tensors(unfinished / part, stem, problems)
    problems += [f"{part}: tensor {name} is not in both." for name in sorted(set(source_tensors) ^ set(written))]
    for name in set(source_tensors) & set(written):
        before, after = source_tensors[name].read().astype(DTYPES[dtype]), written[name].read()
        if before.dtype != after.dtype or before.tobytes() != after.tobytes():
            problems.append(f"{part}: tensor {name} was not written as it was read.")
    if problems:
        raise UserError("\n".join(problems))


def finish(out: Path, wanted: dict[str, Any], source: Source) -> None:
    """Completes a folder whose run was killed after it got its name, and checks its files."""
    manifest = manifest_of(out)
    if differing := [f"{name} {manifest.get(name)}" for name, value in wanted.items() if manifest.get(name) != value]:
        raise UsageError(f"--out: {out} holds another model: {', '.join(differing)}. Name another folder.")
    if not (out / INDEX).exists():
        unfinished = out / f".{INDEX}"
        shutil.copyfile(source.folder / INDEX, unfinished)
        os.replace(unfinished, out / INDEX)
    for name, fact in manifest["files"].items():
        if not (out / name).is_file() or hub.sha256_of(out / name) != fact["sha256"]:
            raise UserError(f"{out / name} is not what {MANIFEST} says. Remove {out}, and the same job makes it again.")


def manifest_of(out: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text("utf-8"))
        return manifest
    except (OSError, ValueError) as error:
        raise UserError(
            f"{out / MANIFEST} cannot be read: {error}. Remove {out}, and the same job makes it again."
        ) from None


if __name__ == "__main__":
    run(main)
