"""Puts the costs of all programs of a host together: what fits, and how much time and money an image takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from app.engine.cost_model import DecodeCost
from capacity.chips import Host
from capacity.compile_pool import CompileOutcome, CompileTask
from capacity.program_cost import GIB, ProgramCost

Size = tuple[int, int]


@dataclass(frozen=True)
class Throughput:
    """Modelled speed of a host whose steps are all shared by `images` images of one size."""

    images: int  # images that share a step
    image_s: float  # device-seconds of the host for each
    padded_s: float  # the least that the matrix units need, all rows spread over all chips


@dataclass(frozen=True)
class HostCosts:
    """A host, and the outcome of compiling each program for it, by the program's name."""

    host: Host
    resident: int  # bytes on each chip: weights of all networks, states of all sizes
    outcomes: Mapping[str, CompileOutcome]

    def cost(self, program: str) -> ProgramCost | None:
        return self.outcomes[program].cost

    @property
    def code(self) -> int:
        """Bytes of all programs, which are loaded together."""
        return sum(outcome.cost.code for outcome in self.outcomes.values() if outcome.cost)

    @property
    def left_out(self) -> list[str]:
        """Everything that the modelled times of some program leave out."""
        return sorted({note for outcome in self.outcomes.values() if outcome.cost for note in outcome.cost.left_out})

    def peak(self, program: str) -> int:
        """Bytes in a chip's memory while the program runs, with weights, states and the code of all programs."""
        cost = self.cost(program)
        return self.resident + self.code + (cost.temporaries + cost.outputs if cost else 0)

    def fits(self, program: str) -> bool:
        return self.cost(program) is not None and self.peak(program) <= self.host.chip.hbm_gib * GIB

    def steps(self, size: Size) -> dict[int, ProgramCost]:
        """The step programs that fit, by their number of rows."""
        return self.fitting(f"step {label(size)} rows ")

    def decodes(self, size: Size) -> dict[int, ProgramCost]:
        return self.fitting(f"decode {label(size)} images ")

    def fitting(self, prefix: str) -> dict[int, ProgramCost]:
        named = {name: int(name.removeprefix(prefix)) for name in self.outcomes if name.startswith(prefix)}
        costs = {number: cost for name, number in named.items() if self.fits(name) and (cost := self.cost(name))}
        return dict(sorted(costs.items()))

    def throughputs(self, size: Size, buckets: tuple[int, ...], evaluations: int, rows: int) -> list[Throughput]:
        """The speed of each bucket, for images of so many UNet evaluations of so many rows each."""
        steps, decodes = self.steps(size), self.decodes(size)
        if not decodes:
            return []
        decode_cost = DecodeCost({images: cost.seconds for images, cost in decodes.items()})
        encode = self.cost("encode")
        text_s = encode.seconds if encode else 0.0  # of one text: the negative prompt is usually cached
        chip, chips = self.host.chip, self.host.chips
        throughputs = []
        for images in buckets:
            step = steps.get(images * rows)
            if step is None:
                continue
            best = decodes[decode_cost.bucket(images)]
            image_s = evaluations * step.seconds / images + decode_cost.image_s() + text_s
            # The bound assumes that all chips share the rows, so a bucket that leaves chips idle is farther from it.
            cycles = evaluations * step.padded_cycles * step.shards / images
            cycles += best.padded_cycles * best.shards / decode_cost.bucket(images)
            throughputs.append(Throughput(images, image_s, cycles / chips / chip.clock))
        return throughputs

    def dollars_per_1000(self, image_s: float) -> float:
        return 1000 * image_s * self.host.dollars_hour / 3600


def costs_by_host(outcomes: Mapping[CompileTask, CompileOutcome], resident: Mapping[Host, int]) -> list[HostCosts]:
    return [
        HostCosts(host, nbytes, {task.program: outcome for task, outcome in outcomes.items() if task.host == host})
        for host, nbytes in resident.items()
    ]


def label(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
