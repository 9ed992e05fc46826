"""The model of a scenario (loadtest/scenarios/*.yaml): arrivals, requests, checks, limits.

A mistake is reported in a line that names the file, the key, the allowed values and the actual value.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.cli import UsageError

FOLDER = Path(__file__).with_name("scenarios")
POST_ONLY = {  # the fields that GET /imagine does not take
    *("async", "webhook_url"),
    *("background", "complexity", "frame_count", "frame_duration_ms", "model", "moderation", "n", "partial_images"),
    *("progress", "quality", "response_format", "safety_identifier", "stream", "style", "svg", "user"),
    *("original_size", "crops_coords_top_left", "target_size"),
}
EDITS_ONLY = ("image", "mask", "strength")  # image and mask are files of this machine, whose content is sent
Endpoint = Literal["generations", "edits", "imagine"]
Rate = Annotated[float, Field(ge=0, le=100_000)]
Span = Annotated[float, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Stage(Part):
    rate: Rate = Field(description="requests a second")
    to: Rate | None = Field(default=None, description="the rate at its end; left out, it does not change")
    duration_s: Span


class Burst(Part):
    at_s: float = Field(ge=0)
    requests: Count = Field(description="sent at once, on top of the stages")


class Open(Part):
    """Open loop: requests are sent on schedule, whether or not earlier ones are answered."""

    process: Literal["constant", "poisson", "gamma"]
    cv: float = Field(default=1.0, gt=0, le=20, description="of gamma: 1 is Poisson, more comes in bursts")
    stages: list[Stage] = Field(min_length=1)
    bursts: list[Burst] = []

    @property
    def duration_s(self) -> float:
        return sum(stage.duration_s for stage in self.stages)

    @model_validator(mode="after")
    def something_arrives(self) -> "Open":
        if not self.bursts and all(max(stage.rate, stage.to or 0) == 0 for stage in self.stages):
            raise ValueError("a stage must have a rate above 0, or there must be a burst")
        for burst in self.bursts:
            if burst.at_s > self.duration_s:
                raise ValueError(f"a burst must come within the stages' {self.duration_s:g} s, got {burst.at_s:g}")
        return self


class Closed(Part):
    """Closed loop: each client sends its next request after its last answer, for a number of requests or a time."""

    process: Literal["closed"]
    concurrency: Annotated[int, Field(ge=1, le=10_000)]
    requests: Count | None = None
    duration_s: Span | None = None

    @model_validator(mode="after")
    def it_ends(self) -> "Closed":
        if self.requests is None and self.duration_s is None:
            raise ValueError("requests or duration_s must be given, so that the run has an end")
        return self


class Replay(Part):
    """The requests of a trace at its times. The requests.jsonl of an earlier run is a trace."""

    process: Literal["replay"]
    trace: Path
    speed: float = Field(default=1.0, gt=0, le=1000)


Arrivals = Annotated[Open | Closed | Replay, Field(discriminator="process")]


class Kind(BaseModel):
    """A kind of request in the mix. All other keys are fields of the API and are sent unchanged."""

    model_config = ConfigDict(extra="allow", frozen=True)

    weight: float = Field(default=1.0, gt=0)
    endpoint: Endpoint = "generations"
    kind: str | None = Field(default=None, description="what the report calls it; left out, its fields")

    @property
    def fields(self) -> Mapping[str, Any]:
        return self.model_extra or {}

    @property
    def label(self) -> str:
        fields = " ".join(f"{name}={value}" for name, value in self.fields.items())
        return (
            self.kind
            or " ".join(filter(None, [self.endpoint if self.endpoint != "generations" else "", fields]))
            or "all"
        )

    @model_validator(mode="after")
    def the_endpoint_takes_the_fields(self) -> "Kind":
        if self.endpoint == "imagine" and (refused := [name for name in self.fields if name in POST_ONLY]):
            raise ValueError(f"GET /imagine does not take {', '.join(refused)}: such fields need endpoint generations")
        if self.endpoint != "edits" and (refused := [name for name in self.fields if name in EDITS_ONLY]):
            raise ValueError(f"{', '.join(refused)} needs endpoint edits")
        if self.endpoint == "edits":
            files = [self.fields.get("image"), *([self.fields["mask"]] if "mask" in self.fields else [])]
            if absent := [file for file in files if not isinstance(file, str) or not Path(file).is_file()]:
                raise ValueError(f"endpoint edits needs an image, and maybe a mask, that are files, not {absent[0]!r}")
        return self


class Checks(Part):
    pictures: bool = Field(default=True, description="decode all, look at their size and whether they are blank")
    repeat: float = Field(default=0.1, ge=0, le=1, description="share of requests that repeat an earlier one, seed too")
    tolerance: int = Field(default=1, ge=0, le=255, description="grey levels by which equal seeds may differ")


class Price(Part):
    chip_hour_usd: float | None = Field(default=None, gt=0)
    chips_per_replica: int | None = Field(
        default=None, ge=1, description="left out, the TPU resource that Serve gives it"
    )


class Watch(Part):
    interval_s: float = Field(default=1.0, ge=0.2, le=60, description="how often the cluster is asked how it is")
    settle_s: float = Field(
        default=0, ge=0, le=3600, description="after the load, wait so long at most for replicas and nodes to go again"
    )


class Scenario(Part):
    description: str = ""
    seed: int = Field(default=1, ge=0, lt=2**32)
    arrivals: Arrivals
    mix: list[Kind] = Field(default=[Kind()], min_length=1)
    prompts: Path | None = Field(default=None, description="as jobs read them; null: built in")
    warmup_s: float = Field(default=0, ge=0, description="what is sent in this time is not counted")
    cooldown_s: float = Field(default=0, ge=0, description="nor what is sent in this time before the end")
    timeout_s: float = Field(default=120, gt=0, le=3600, description="longest wait for an answer")
    objective_s: float | None = Field(default=None, gt=0, description="goodput counts answers within this latency")
    max_requests: Count = 10_000
    max_in_flight: Annotated[int, Field(ge=1, le=20_000)] = 2_000
    checks: Checks = Checks()
    price: Price = Price()
    watch: Watch = Watch()

    @property
    def duration_s(self) -> float | None:
        """The length of the schedule; None if it is not known in advance."""
        return None if isinstance(self.arrivals, Replay) else self.arrivals.duration_s


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str, overrides: Mapping[str, Any]) -> Scenario:
    """Loads a shipped scenario by name, or a file. Overrides have dotted keys; an override of None is ignored."""
    path = FOLDER / f"{name}.yaml" if name in names() else Path(name)
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"There is no scenario {name}; there are {', '.join(names())}, or name a YAML file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold keys such as arrivals, got {content!r}.")
    return parse(content, str(path), overrides)


def parse(content: Mapping[str, Any], source: str, overrides: Mapping[str, Any]) -> Scenario:
    merged = dict(content)
    for key, value in overrides.items():
        if value is not None:
            merged = put(merged, key.split("."), value)
    try:
        return Scenario.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        got = "" if first["type"] in ("missing", "extra_forbidden") else f", got {short(first['input'])}"
        raise UsageError(f"{source}: {where or 'it'}: {first['msg']}{got}.") from None


def put(content: Mapping[str, Any], key: list[str], value: Any) -> dict[str, Any]:
    if len(key) == 1:
        return {**content, key[0]: value}
    inner = content.get(key[0])
    return {**content, key[0]: put(inner if isinstance(inner, dict) else {}, key[1:], value)}


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
