"""TPU generations: speeds, memory, prices, and the names that Google and libtpu use for them.

Speeds, memory and matrix units are Google's (cloud.google.com/tpu/docs, the page of each version). The clock is peak
FLOPs a second divided by FLOPs a cycle. Prices are Google's list prices on demand when this was written; DOLLARS=
overrides them.
"""

import re
from dataclasses import dataclass

PRICES_OF = "list prices on demand in the cheapest American region, as of mid-2025"


@dataclass(frozen=True)
class Chip:
    """A generation of TPU chips. The two cores of a v4 or v5p chip work as one."""

    name: str
    sold_as: str  # the prefix of its accelerator types
    cores: int  # cores of a chip in the number of an accelerator type
    peak_flops: float  # bfloat16, a second
    flops_a_cycle: int  # of all matrix units
    tile: int  # side of a matrix unit
    hbm_gib: float  # available to programs
    hbm_bytes_s: float
    dollars_hour: float
    hosts: tuple[int, ...]  # possible numbers of chips of a host
    flat: bool  # its topologies have two dimensions

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.peak_flops / self.flops_a_cycle


def units(count: int, tile: int) -> int:
    """FLOPs per cycle of `count` matrix units."""
    return 2 * count * tile * tile


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4", 2, 275e12, units(8, 128), 128, 30.75, 1.2e12, 3.22, (4,), False),
        Chip("v5e", "v5litepod", 1, 197e12, units(4, 128), 128, 15.75, 0.819e12, 1.20, (1, 4, 8), True),
        Chip("v5p", "v5p", 2, 459e12, units(8, 128), 128, 95.74, 2.765e12, 4.20, (4,), False),
        Chip("v6e", "v6e", 1, 918e12, units(4, 256), 256, 31.25, 1.638e12, 2.70, (1, 4, 8), True),
    )
}
SHAPES = {1: "1x1", 4: "2x2", 8: "2x4"}  # of a host's chips


@dataclass(frozen=True)
class Host:
    """A host with all its chips, which one replica uses."""

    chip: Chip
    chips: int

    @property
    def accelerator_type(self) -> str:
        """Its name at Google and in cluster.yaml."""
        return f"{self.chip.sold_as}-{self.chips * self.chip.cores}"

    @property
    def dollars_hour(self) -> float:
        return self.chips * self.chip.dollars_hour


def host_of(accelerator_type: str) -> Host:
    """`v5litepod-8` -> its host. Raises ValueError with the known types."""
    named = re.fullmatch(r"([a-z0-9]+)-(\d+)", accelerator_type)
    chip = next((chip for chip in CHIPS.values() if named and named[1] in (chip.name, chip.sold_as)), None)
    hosts = [Host(chip, chips) for chip in CHIPS.values() for chips in chip.hosts]
    if named and chip:
        chips, rest = divmod(int(named[2]), chip.cores)
        if chips in chip.hosts and not rest:
            return Host(chip, chips)
    names = ", ".join(host.accelerator_type for host in hosts)
    raise ValueError(f"TPU must be one host, {names}, got {accelerator_type}.")
