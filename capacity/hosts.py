"""What the prices of all programs of a host say together: what fits, and how fast and dear pictures are."""

from collections.abc import Mapping
from dataclasses import dataclass

from app.engine.cost_model import DecodeCost
from capacity.chips import Host
from capacity.price import GIB, Price
from capacity.pricing import Outcome, Task

Size = tuple[int, int]


@dataclass(frozen=True)
class Rate:
    """Pictures of one size that share every step, one bucket full after the other. Modelled."""

    images: int  # that share a step
    image_s: float  # device-seconds of the host for each
    padded_s: float  # the least that the matrix units need, all rows spread over all chips


@dataclass(frozen=True)
class Priced:
    """A host with the outcome of each program, by its name."""

    host: Host
    resident: int  # bytes on each chip: weights of all networks, states of all sizes
    outcomes: Mapping[str, Outcome]

    def price(self, program: str) -> Price | None:
        return self.outcomes[program].price

    @property
    def code(self) -> int:
        """All programs are loaded at once."""
        return sum(outcome.price.code for outcome in self.outcomes.values() if outcome.price)

    def peak(self, program: str) -> int:
        """Bytes on a chip while it runs, with all that lies there beside it."""
        price = self.price(program)
        return self.resident + self.code + (price.temporaries + price.outputs if price else 0)

    def fits(self, program: str) -> bool:
        return self.price(program) is not None and self.peak(program) <= self.host.chip.hbm_gib * GIB

    def steps(self, size: Size) -> dict[int, Price]:
        """By rows, those that fit."""
        return self.priced(f"step {label(size)} rows ")

    def decodes(self, size: Size) -> dict[int, Price]:
        return self.priced(f"decode {label(size)} images ")

    def priced(self, prefix: str) -> dict[int, Price]:
        named = {name: int(name.removeprefix(prefix)) for name in self.outcomes if name.startswith(prefix)}
        found = {number: price for name, number in named.items() if self.fits(name) and (price := self.price(name))}
        return dict(sorted(found.items()))

    def rates(self, size: Size, buckets: tuple[int, ...], evaluations: int, rows: int) -> list[Rate]:
        """By bucket, for pictures of so many UNet evaluations of so many rows each."""
        steps, decodes = self.steps(size), self.decodes(size)
        if not decodes:
            return []
        decode_cost = DecodeCost({images: price.seconds for images, price in decodes.items()})
        encode = self.price("encode")
        text_s = encode.seconds if encode else 0.0  # its loop counts as one text; the negative one is known already
        chip, chips = self.host.chip, self.host.chips
        found = []
        for images in buckets:
            step = steps.get(images * rows)
            if step is None:
                continue
            best = decodes[decode_cost.bucket(images)]
            image_s = evaluations * step.seconds / images + decode_cost.image_s() + text_s
            # Divided among all chips, be it so or not: a bucket that leaves chips idle is the further from its bound.
            cycles = evaluations * step.padded_cycles * step.shards / images
            cycles += best.padded_cycles * best.shards / decode_cost.bucket(images)
            found.append(Rate(images, image_s, cycles / chips / chip.clock))
        return found

    def dollars_per_1000(self, image_s: float) -> float:
        return 1000 * image_s * self.host.dollars_hour / 3600


def priced_hosts(outcomes: Mapping[Task, Outcome], resident: Mapping[Host, int]) -> list[Priced]:
    return [
        Priced(host, held, {task.program: found for task, found in outcomes.items() if task.host == host})
        for host, held in resident.items()
    ]


def label(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
