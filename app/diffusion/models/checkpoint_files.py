"""A checkpoint's small files and the headers of its weights: from a folder in diffusers layout, or from one file.

The loader goes on from them to the weights, and the linter judges a checkpoint by them alone. Imports no JAX.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.diffusion.families.family import Family
from app.diffusion.families.registry import recognise
from app.diffusion.models.single_file import read_single_file
from app.diffusion.models.small_files import read_json
from app.diffusion.models.tokenizer_files import ALL_FILES, tokenizer_problems
from app.diffusion.models.weight_files import Tensor, find_tensors, variant_problems
from app.diffusion.samplers import FlowSchedule, Schedule, departures

Json = Mapping[str, Any]

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class CheckpointFiles:
    """`configs` and `tensors` are by component, `tokenizers` and `padding` by the tokenizer's name."""

    path: Path
    kind: type[Family]
    index: Json  # the content of model_index.json
    configs: Mapping[str, Json]
    scheduler: Json
    tensors: Mapping[str, Mapping[str, Tensor]]
    tokenizers: Mapping[str, Path]
    padding: Mapping[str, str] = field(default_factory=dict)  # tokens that follow from what one file is

    def family(self, problems: list[str]) -> Family:
        """A family whose networks do not fit together where problems were added."""
        return architecture(self.kind, self.configs, self.index, problems, "" if self.path.is_dir() else self.path.name)

    def schedule(self, problems: list[str]) -> tuple[Schedule | FlowSchedule | None, list[str]]:
        """And a sentence for each option that is not followed as it stands, or that follows from what one file is."""
        if self.path.is_dir():
            return schedule_of(self.kind, self.scheduler, problems) if self.scheduler else (None, [])
        schedule, remarks = schedule_of(self.kind, self.scheduler, problems, self.path.name)
        prediction = f"{self.path.name}: prediction_type is {self.scheduler['prediction_type']}."
        return schedule, [prediction, *remarks]

    def tokenizer_problems(self) -> Iterator[str]:
        """What does not fit the text encoders. Nothing of a text encoder whose configuration is wrong itself."""
        for name, folder in self.tokenizers.items():
            unclear: list[str] = []
            part = self.kind.TOKENIZERS[name]
            text = self.kind.COMPONENTS[part].read(self.configs[part], unclear, part)
            if not unclear:
                yield from tokenizer_problems(folder, text, name, fixed_length=self.kind.TOKENIZER.fixed_length)

    def weights(self, part: str, family: Family) -> dict[str, Tensor]:
        """The tensors that a component's network reads."""
        unread = self.kind.COMPONENTS[part].unread
        return {name: tensor for name, tensor in self.tensors[part].items() if not unread(getattr(family, part), name)}


def read_folder(folder: Path, variant: str | None, problems: list[str]) -> CheckpointFiles | None:
    """None with problems where no family has its components."""
    index = read_json(folder / INDEX, INDEX, problems)
    kind = recognise(index or {file.name: None for file in folder.iterdir()}, [] if problems else problems)
    if kind is None:
        return None
    if index:
        problems += wrong_classes(kind, index)
    configs = component_configs(kind, folder, problems)
    scheduler = read_json(folder / SCHEDULER, SCHEDULER, problems)
    tensors = {
        part: find_tensors(folder / part, component.stem, problems, variant)
        for part, component in kind.COMPONENTS.items()
    }
    problems += variant_problems({tensor.where for named in tensors.values() for tensor in named.values()}, variant)
    tokenizers = {name: folder / name for name in kind.TOKENIZERS}
    return CheckpointFiles(folder, kind, index, configs, scheduler, tensors, tokenizers)


def read_file(file: Path, tokenizer: Path | None, problems: list[str]) -> CheckpointFiles | None:
    """`tokenizer` is a folder with CLIP's vocabulary, or with folders of tokenizers in it. None: it is not judged."""
    single = read_single_file(file, problems)
    kind = recognise(single.index, problems) if single else None
    if single is None or kind is None:
        return None
    tokenizers = {name: tokenizer_folder(tokenizer, name) for name in kind.TOKENIZERS} if tokenizer else {}
    padding = {name: single.padding[part] for name, part in kind.TOKENIZERS.items()}
    return CheckpointFiles(
        file, kind, single.index, single.configs, single.scheduler, single.tensors, tokenizers, padding
    )


def tokenizer_folder(folder: Path, name: str) -> Path:
    """The tokenizer of that name in a folder, or the folder itself, or its first tokenizer: one vocabulary fits all."""
    places = [folder / name, folder, folder / "tokenizer"]
    return next((place for place in places if any((place / file).is_file() for file in ALL_FILES)), folder)


def wrong_classes(kind: type[Family], index: Json) -> Iterator[str]:
    classes = {part: (component.class_name, *component.aliases) for part, component in kind.COMPONENTS.items()}
    tokenizer = kind.TOKENIZER.class_name
    for part, wanted in (classes | dict.fromkeys(kind.TOKENIZERS, (tokenizer, f"{tokenizer}Fast"))).items():
        entry = index.get(part)
        got = entry[-1] if isinstance(entry, list) and entry else entry
        if got not in wanted:
            yield f"{INDEX}: {part} must be a {wanted[0]}, got {got}."


def component_configs(kind: type[Family], folder: Path, problems: list[str]) -> dict[str, dict[str, Any]]:
    """The content of each component's config.json."""
    names = {part: f"{part}/config.json" for part in kind.COMPONENTS}
    return {part: read_json(folder / name, name, problems) for part, name in names.items()}


def architecture(
    kind: type[Family], configs: Mapping[str, Json], index: Json, problems: list[str], file: str = ""
) -> Family:
    """The family of a checkpoint with these configurations, which are read off `file` where there is one."""
    names = {part: f"{file}: {part}" if file else f"{part}/config.json" for part in kind.COMPONENTS}
    parts = kind.COMPONENTS.items()
    before = len(problems)
    family = kind.of({part: component.read(configs[part], problems, names[part]) for part, component in parts}, index)
    if len(problems) == before and all(configs.values()):
        problems += family.problems()
    return family


def schedule_of(
    kind: type[Family], content: Json, problems: list[str], where: str = SCHEDULER
) -> tuple[Schedule | FlowSchedule | None, list[str]]:
    """And a sentence for each option that is not followed as it stands."""
    try:
        schedule, remarks = kind.schedule(content)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return None, []
    return schedule, [f"{where}: {remark}" for remark in (*remarks, *departures(schedule))]
