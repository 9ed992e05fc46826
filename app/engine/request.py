"""Who stands in line: requests, their pictures, and all of one size together; and when each of them would be done.

Data and arithmetic. The engine owns these objects, changes them and guards them; nothing here knows of threads, clocks
or devices.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from app.diffusion.samplers import SamplerTable
from app.engine.scheduler import Decoding, Profile, Work, at_once, device_s, schedule
from app.types import SEEDS, Generation, Size

Preview = Callable[[int, np.ndarray], None]

# Less left goes first, but not for ever: a request with t seconds of work more than another is overtaken by it only if
# that one came no later than t / AGEING seconds after it.
AGEING = 0.2


@dataclasses.dataclass(frozen=True)
class Generated:
    """The pictures of one request and what it took to make them."""

    pixels: np.ndarray  # uint8 [n, H, W, 3]
    seeds: tuple[int, ...]
    sampler: str
    prompt_truncated: bool
    negative_prompt_truncated: bool
    queue_s: float
    denoise_s: float  # from the first picture's first step to the device's end of the last one's last, with pauses
    decode_s: float  # from there to pixels on the host
    device_s: float  # its share of the steps and decodes that it took part in


@dataclasses.dataclass(eq=False)
class Picture:
    """One image in the making."""

    request: "Request"
    number: int  # among the request's
    steps_left: int
    slot: int | None = None
    previews: list[int] = dataclasses.field(default_factory=list)  # `steps_left` at which each is due, falling
    last_dispatch: Any = None  # of the engine: the one that its last step is in

    @property
    def work(self) -> Work:
        return Work(self.steps_left, self.request.rows, self is self.request.pictures[-1])


@dataclasses.dataclass(eq=False)
class Request:
    generation: Generation
    table: SamplerTable
    since: float
    on_preview: Preview | None = None
    future: "Future[Generated]" = dataclasses.field(default_factory=Future)
    pictures: list[Picture] = dataclasses.field(default_factory=list)  # those that are not decoded yet
    texts: tuple[Any, Any] | None = None  # prompt and negative prompt, encoded
    began: float | None = None
    refused: bool = False  # it waited when the engine began to drain, so it never begins
    denoised: float = 0.0  # when the device finished the last step of those of its pictures that were fetched
    device_s: float = 0.0
    previewed: int = 0
    pixels: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        generation: Generation,
        table: SamplerTable,
        since: float,
        previews: int = 0,
        on_preview: Preview | None = None,
    ) -> "Request":
        """With its pictures, each to be shown at as many of its steps as `previews` says, or as it has."""
        request, steps = cls(generation, table, since, on_preview), len(table)
        due = sorted({steps - round(steps * (i + 1) / (previews + 1)) for i in range(previews)} - {0, steps})
        request.pictures = [Picture(request, number, steps, previews=due[:]) for number in range(generation.n)]
        return request

    @property
    def size(self) -> Size:
        return self.generation.width, self.generation.height

    @property
    def rows(self) -> int:
        """Of the UNet, for each step of each picture."""
        return 1 + (self.generation.guidance_scale > 1)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple((self.generation.seed + i) % SEEDS for i in range(self.generation.n))

    def generated(self, default_sampler: str, now: float) -> Generated:
        assert self.began is not None and self.texts is not None
        prompt, negative_prompt = self.texts
        return Generated(
            pixels=np.stack([self.pixels[number] for number in range(self.generation.n)]),
            seeds=self.seeds,
            sampler=self.generation.sampler or default_sampler,
            prompt_truncated=prompt.truncated,
            negative_prompt_truncated=negative_prompt.truncated,
            queue_s=self.began - self.since,
            denoise_s=self.denoised - self.began,
            decode_s=now - self.denoised,
            device_s=self.device_s,
        )


@dataclasses.dataclass(eq=False)
class Group:
    """All of one size: its slots and its line."""

    size: Size
    state: Any
    profile: Profile
    decoding: Decoding
    free: list[int]  # slots
    gain: float  # both as app/engine/scheduler.py's at_once has them
    fixed: int | None
    requests: list[Request] = dataclasses.field(default_factory=list)  # with pictures that are not decoded yet
    turn: float = 0.0  # device time had, over pictures there were to share it; the group with the least is next
    coming: float = 0.0  # requests, before the device is idle
    images_at_once: int = 0
    open: bool = False  # to a newcomer, which would share the very next step
    steps: int = 0
    rows_asked: float = 0.0  # running sums of rows that were asked for and rows that buckets made of them
    rows_run: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.size[0]}x{self.size[1]}"

    def rank(self, request: Request) -> float:
        """The lower, the sooner: device-seconds that are left, and when it came, in ageing's measure."""
        return device_s((picture.work for picture in request.pictures), self.profile) + AGEING * request.since

    def pictures(self) -> list[Picture]:
        """The line: requests by what is left of them, with ageing; within one, those that have begun first."""
        line = sorted(self.requests, key=self.rank)
        return [
            picture
            for request in line
            for picture in sorted(request.pictures, key=lambda picture: (picture.steps_left, picture.number))
            if picture.steps_left
        ]

    def share(self, line: Sequence[Work]) -> int:
        return at_once(line, self.profile, self.gain, self.coming, self.fixed)

    def filled(self, line: Sequence[Picture], count: int) -> list[Picture]:
        """The first so many, and those behind them that fit into rows which the bucket has left: they cost nothing."""
        chosen = list(line[:count])
        if chosen and self.fixed is None:
            rows = sum(picture.request.rows for picture in chosen)
            left = self.profile.bucket(rows) - rows
            for picture in line[count:]:
                if picture.request.rows <= left:
                    chosen.append(picture)
                    left -= picture.request.rows
        return chosen

    def spans(self, line: Sequence[Work]) -> list[tuple[float, float]]:
        return schedule(line, self.profile, self.gain, self.coming, self.fixed)


Lines = Mapping[Group, Sequence[Picture]]  # of every size, in order, and at its end those that have just arrived


def backlog_s(group: Group, line: Sequence[Picture]) -> float:
    """Device-seconds that are left in a line."""
    return device_s((picture.work for picture in line), group.profile) + len(line) * group.decoding.image_s()


def answer_s(request: Request, group: Group, lines: Lines, last: bool = False) -> float:
    """From now until the request would be answered if nobody else came; `last`: and if it overtook nobody."""
    own = [picture.work for picture in request.pictures]
    standing = lines[group]
    requests = dict.fromkeys(picture.request for picture in standing)
    before = {one for one in requests if last or group.rank(one) <= group.rank(request)}
    ahead = [picture.work for picture in standing if picture.request in before]
    ends = [end for _, end in group.spans([*ahead, *own])]
    denoised_s = max(ends[-len(own) :])
    decodes = sum(end <= denoised_s for end in ends)
    # Other sizes have their turns, in proportion to their pictures and until they are through, and decode between them.
    theirs = {other: line for other, line in lines.items() if other is not group}
    others_s = sum(backlog_s(other, line) for other, line in theirs.items())
    steps_s = sum(device_s((picture.work for picture in line), other.profile) for other, line in theirs.items())
    turns_s = denoised_s * sum(map(len, theirs.values())) / (len(standing) + len(own))
    through = 1.0 if last or turns_s >= steps_s else turns_s / steps_s
    return denoised_s + through * others_s + decodes * group.decoding.image_s()


def place_s(lines: Lines) -> float:
    """From now until a place in the queue should be free: when the next that waits begins."""
    pictures = sum(map(len, lines.values()))
    places_s = []
    for group, line in lines.items():
        spans = group.spans([picture.work for picture in line])
        begins = [start for (start, _), picture in zip(spans, line, strict=True) if picture.request.began is None]
        if begins:
            decodes = sum(end <= min(begins) for _, end in spans)
            own_s = min(begins) + decodes * group.decoding.image_s()
            places_s.append(own_s * pictures / len(line))  # sizes take turns
    return max(0.1, min(places_s, default=0.0))
