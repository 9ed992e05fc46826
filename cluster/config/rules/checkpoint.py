"""Rules about the checkpoint that a Serve config names: whether it can be loaded, by its small files and its headers.

A replica would notice only at its start, when the running replicas have already been stopped for it. Reads no weights
and imports no JAX. What only the weights show, such as a NaN, the replica reports.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from app.builders import Args
from app.diffusion.families.family import Component, Family
from app.diffusion.families.registry import recognise
from app.diffusion.models.shapes import Shape
from app.diffusion.models.tensor_names import squeezed
from app.diffusion.models.tokenizer_files import tokenizer_problems
from app.diffusion.models.weight_files import Tensor, find_tensors
from app.diffusion.samplers import default_sampler, make_table
from app.types import parse_size
from cluster import ROOT
from cluster.config.documents import Finding, Key
from cluster.config.serve_config import Application

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
LISTED = 3  # problems of one kind that are listed; the rest are counted

Problems = list[str]
Report = Callable[[Key, str], Finding]


def check_checkpoint(app: Application, args: Args) -> Iterator[Finding]:
    folder = (ROOT / Path(args.model).expanduser()).resolve()
    report: Report
    if folder.is_dir():
        report, verdict = app.error, f"{args.model} cannot be loaded"
    elif cached := cached_folder(args.model, args.revision):  # the nodes may have another copy, or download it again
        folder, report, verdict = cached, app.advice, f"{args.model} in this machine's Hub cache cannot be loaded"
    else:
        return
    key = ("args", "model")
    problems: Problems = []
    index = read_json(folder / INDEX, problems)
    kind = recognise(index, problems) if index else None
    parts = kind.COMPONENTS.items() if kind else ()
    files = {part: read_json(folder / part / "config.json", problems) for part, _ in parts}
    scheduler = read_json(folder / SCHEDULER, problems)
    if problems or kind is None:
        yield from (report(key, f"{verdict}: {problem}") for problem in problems)
        return
    configs = {part: component.read(files[part], problems, f"{part}/config.json") for part, component in parts}
    yield from wrong_schedule(kind, scheduler, args, report, problems)
    if not problems:  # otherwise the architecture is unknown
        family = kind.of(configs, index)
        problems += family.problems()
        for name, part in kind.TOKENIZERS.items():
            problems += tokenizer_problems(folder / name, configs[part], fixed_length=kind.TOKENIZER.fixed_length)
        for part, component in parts:
            problems += weight_problems(folder / part, component, configs[part])
        multiple = family.size_multiple
        for size in args.sizes:
            if any(side % multiple for side in parse_size(size)):
                yield report(("args", "sizes"), f"must be multiples of {multiple} for {args.model}, got {size}.")
    for problem in problems:
        yield report(key, f"{verdict}: {problem}")


def cached_folder(model: str, revision: str | None) -> Path | None:
    """The folder of a model that was downloaded from the Hub to this machine."""
    import huggingface_hub  # takes a second

    file = huggingface_hub.try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(file).parent if isinstance(file, str) else None


def read_json(file: Path, problems: Problems) -> Mapping[str, Any]:
    name = file.name if file.name == INDEX else f"{file.parent.name}/{file.name}"
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        problems.append(f"{name} is missing.")
    except (OSError, ValueError) as error:
        problems.append(f"{name} cannot be read: {error}.")
    else:
        if isinstance(content, dict):
            return content
        problems.append(f"{name} must hold a JSON object, got a {type(content).__name__}.")
    return {}


def wrong_schedule(
    kind: type[Family], content: Mapping[str, Any], args: Args, report: Report, problems: Problems
) -> Iterator[Finding]:
    """A request that names neither sampler nor steps must be possible with this checkpoint."""
    try:
        schedule, _ = kind.schedule(content)
    except ValueError as error:
        problems.append(f"{SCHEDULER}: {error}")
        return
    try:
        sampler = args.defaults.sampler or default_sampler(schedule)
        # Any number of image tokens will do: it moves the noise levels and makes nothing impossible.
        make_table(sampler, args.defaults.num_inference_steps, schedule, image_tokens=1)
    except ValueError as error:
        yield report(("args", "defaults"), f"do not suit {args.model}: {error}")


def weight_problems(folder: Path, component: Component, architecture: Any) -> Problems:
    problems: Problems = []
    tensors = find_tensors(folder, component.stem, problems)
    tensors = {name: tensor for name, tensor in tensors.items() if not component.unread(architecture, name)}
    expected = component.tensors(architecture)
    if not problems:
        problems += [problem for kind in differences(folder.name, tensors, expected) for problem in shortened(kind)]
    return problems


def differences(part: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Shape]) -> Iterator[Problems]:
    """How the stored tensors differ from the architecture's, by kind."""
    yield [f"{part}: tensor {name} is missing." for name in sorted(expected.keys() - tensors.keys())]
    surplus = sorted(tensors.keys() - expected.keys())
    yield [f"{tensors[name].where}: tensor {name} is not one that its config.json describes." for name in surplus]
    yield [
        f"{tensors[name].where}: tensor {name} must have shape {[*expected[name]]} by its config.json, "
        f"got {[*tensors[name].shape]}."
        for name in sorted(expected.keys() & tensors.keys())
        if squeezed(tensors[name].shape) != squeezed(expected[name])
    ]


def shortened(problems: Problems) -> Problems:
    more = len(problems) - LISTED
    return (
        problems
        if more <= 1
        else [*problems[:LISTED], f"{problems[0].partition(': ')[0]}: and {more} more of that kind."]
    )
