"""Rules about the checkpoint that a Serve config names: whether it can be loaded, by its small files and its headers.

A replica would notice only at its start, when the running replicas have already been stopped for it. Reads no weights
and imports no JAX. What only the weights show, such as a NaN, the replica reports.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from app.builders import Args
from app.diffusion.families.family import Family
from app.diffusion.models.checkpoint_files import INDEX, read_file, read_folder
from app.diffusion.models.hub_files import cached_folder
from app.diffusion.models.shapes import Shape
from app.diffusion.models.tensor_names import squeezed
from app.diffusion.models.tokenizer_files import VOCAB
from app.diffusion.models.weight_files import Tensor
from app.diffusion.samplers import FlowSchedule, Schedule, default_sampler, make_table
from app.types import Generation, parse_size
from cluster import ROOT
from cluster.config.documents import Finding, Key
from cluster.config.serve_config import Application

LISTED = 3  # problems of one kind that are listed; the rest are counted

Problems = list[str]
Report = Callable[[Key, str], Finding]


def check_checkpoint(app: Application, args: Args) -> Iterator[Finding]:
    path = (ROOT / Path(args.model).expanduser()).resolve()
    problems: Problems = []
    report: Report = app.error
    verdict = f"{args.model} cannot be loaded"
    if path.is_file():
        files = read_file(path, tokenizer_of(args), problems)
    elif path.is_dir():
        files = read_folder(path, args.variant, problems)
    elif cached := cached_folder(args.model, args.revision, [INDEX]):
        # The nodes may have another copy, or download it again.
        report, verdict = app.advice, f"{args.model} in this machine's Hub cache cannot be loaded"
        files = read_folder(cached, args.variant, problems)
    else:
        return
    key = ("args", "model")
    if files:
        readable = not problems
        family = files.family(problems)
        schedule, _ = files.schedule(problems)
        if schedule:
            yield from wrong_defaults(family, schedule, args, report)
        problems += files.tokenizer_problems()
        for part, component in files.kind.COMPONENTS.items() if readable else ():
            problems += weight_problems(part, files.weights(part, family), component.tensors(getattr(family, part)))
        multiple = family.size_multiple
        for size in args.sizes:
            if any(side % multiple for side in parse_size(size)):
                yield report(("args", "sizes"), f"must be multiples of {multiple} for {args.model}, got {size}.")
            elif args.shard_images is True and not family.divides_images("denoise", parse_size(size), 2):
                words = f"must be auto or false: {args.model} cannot divide images of {size} over chips."
                yield report(("args", "shard_images"), words)
    for problem in problems:
        yield report(key, f"{verdict}: {problem}")


def tokenizer_of(args: Args) -> Path | None:
    """The folder of the tokenizer of a model in one file, if this machine has it."""
    assert args.tokenizer is not None  # the builder refuses it otherwise
    folder = (ROOT / Path(args.tokenizer).expanduser()).resolve()
    return folder if folder.is_dir() else cached_folder(args.tokenizer, None, [VOCAB, f"tokenizer/{VOCAB}"])


def wrong_defaults(family: Family, schedule: Schedule | FlowSchedule, args: Args, report: Report) -> Iterator[Finding]:
    """A request that gives a prompt alone must be possible with this checkpoint."""
    sampler = args.defaults.sampler
    width, height = parse_size(args.sizes[0])
    numbers, _ = args.defaults.completed(family.defaults(schedule), args.limits)
    try:
        family.check(Generation("", "", width, height, *numbers, 0, sampler, 1))
        # Any number of image tokens will do: it moves the noise levels and makes nothing impossible.
        make_table(sampler or default_sampler(schedule), numbers.num_inference_steps, schedule, image_tokens=1)
    except ValueError as error:
        yield report(("args", "defaults"), f"do not suit {args.model}: {error}")


def weight_problems(part: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Shape]) -> Problems:
    """How the stored tensors differ from the architecture's, shortened by kind."""
    missing = [f"{part}: tensor {name} is missing." for name in sorted(expected.keys() - tensors.keys())]
    surplus = [
        f"{part}: tensor {name} is not one that this architecture has."
        for name in sorted(tensors.keys() - expected.keys())
    ]
    wrong = [
        f"{part}: tensor {name} must have shape {[*expected[name]]}, got {[*tensors[name].shape]}."
        for name in sorted(expected.keys() & tensors.keys())
        if squeezed(tensors[name].shape) != squeezed(expected[name])
    ]
    return [problem for kind in (missing, surplus, wrong) for problem in shortened(kind)]


def shortened(problems: Problems) -> Problems:
    more = len(problems) - LISTED
    return (
        problems
        if more <= 1
        else [*problems[:LISTED], f"{problems[0].partition(': ')[0]}: and {more} more of that kind."]
    )
