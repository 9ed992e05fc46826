"""Adds up the cycles of a compiled program from its HLO text. Knows nothing of chips, models or JAX.

libtpu writes an estimate beside most operations that it compiles (`estimated_cycles`). A loop's body counts once for
each iteration, and a conditional counts as its most expensive branch. The estimate of a fusion covers what is inside.
A loop whose number of iterations depends on the program's arguments counts once. Async copies have no estimate: they
are assumed to be hidden behind computation.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
OP_NAME = re.compile(r'op_name="([^"]*)"')
OPERANDS = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"(?:calls|to_apply|called_computation|async_computation)=%?([\w.\-]+)")
LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)
KNOWN_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"?(\d+)')

VALUE_KEEPING = {"copy", "bitcast", "convert", "reshape"}  # opcodes that do not change a scalar
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
EXPENSIVE = (  # reported if they have no estimate
    *COLLECTIVES,
    "custom-call",
    "sort",
    "fusion",
    "convolution",
    "dot",
    "gather",
    "scatter",
)

# Custom calls that do nothing.
MARKERS = ('"AllocateBuffer"', '"AssumeGatherIndicesInBound"', '"GatherScatterIndicesBitpacked"')
NO_ESTIMATE = 1 << 62  # libtpu writes this many cycles or update where its estimate failed


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    text: str  # from the opcode on
    root: bool

    @property
    def cycles(self) -> int | None:
        match = CYCLES.search(self.text)
        return int(match[1]) if match else None

    @property
    def op_name(self) -> str:
        """Its origin in the program's source: names of functions and scopes, joined by slashes."""
        match = OP_NAME.search(self.text)
        return match[1] if match else ""

    @property
    def operands(self) -> list[str]:
        """Names of the operands, without their types."""
        opened = self.text.index("(")
        return OPERANDS.findall(self.text[opened : closing(self.text, opened)])


@dataclass(frozen=True)
class Computation:
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction | None:
        return next((instruction for instruction in self.instructions.values() if instruction.root), None)


@dataclass
class CycleCount:
    """Cycles by op_name. Custom kernels are counted apart, as their estimates are unreliable."""

    cycles: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)  # op_name -> calls
    kernel_cycles: Counter[str] = field(default_factory=Counter)  # op_name -> the kernels' own estimates
    unpriced: Counter[str] = field(default_factory=Counter)  # opcode -> how many have no estimate
    open_loops: int = 0  # loops of an unknown number of iterations, which count once

    def add(self, other: "CycleCount", times: int = 1) -> None:
        for name in ("cycles", "kernels", "kernel_cycles", "unpriced"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += value * times
        self.open_loops += other.open_loops

    @property
    def total(self) -> int:
        return self.cycles.total() + self.kernel_cycles.total()


def count_cycles(text: str) -> CycleCount:
    """Counts the cycles of a compiled program, given as the text of `Compiled.as_text()`."""
    computations, entry = parse(text)
    return count_computation(entry, computations, {})


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Reiterations all computations by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    entry, inside = "", None
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if inside is None:
            if opened := COMPUTATION.match(line):
                inside, instructions = opened[2], {}
                entry = inside if opened[1] else entry
        elif line.startswith("}"):
            computations[inside] = Computation(instructions)
            inside = None
        elif match := INSTRUCTION.match(line):
            root, name, value = match.groups()
            operation = after_type(value)
            if opcode := OPCODE.search(operation):
                instructions[name] = Instruction(name, opcode[1], operation[opcode.start(1) :], bool(root))
    if not entry:
        raise ValueError("the text holds no ENTRY computation: it is not a compiled program.")
    return computations, entry


def after_type(text: str) -> str:
    """`(f32[2], s32[]) while(...)` -> `while(...)`. The type of a tuple has parentheses too."""
    return " " + (text[closing(text, 0) + 1 :] if text.startswith("(") else text.partition(" ")[2])


def closing(text: str, opened: int) -> int:
    """The index of the parenthesis that closes the one at index `opened`."""
    depth = 0
    for index in range(opened, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index
    return len(text) - 1


def count_computation(name: str, computations: Mapping[str, Computation], done: dict[str, CycleCount]) -> CycleCount:
    if name in done:
        return done[name]
    total = CycleCount()
    for instruction in computations[name].instructions.values() if name in computations else ():
        if instruction.opcode == "while" and (loop := LOOP.search(instruction.text)):
            iterations = trip_count(instruction, computations[name], computations)
            total.add(count_computation(loop[2], computations, done), 1 if iterations is None else iterations)
            total.open_loops += iterations is None
        elif instruction.opcode == "conditional" and (match := BRANCHES.search(instruction.text)):
            branches = OPERANDS.findall(match[1]) if match[1] else [match[2], match[3]]
            counts = [count_computation(branch, computations, done) for branch in branches]
            total.add(max(counts, key=lambda count: count.total))
        elif instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.text:
            total.kernels[instruction.op_name] += 1
            total.kernel_cycles[instruction.op_name] += instruction.cycles or 0
        elif (cycles := instruction.cycles) is not None:
            if cycles < NO_ESTIMATE:
                total.cycles[instruction.op_name] += cycles
            else:
                total.unpriced[instruction.opcode] += 1
        elif instruction.opcode in ("fusion", "call", "async-start") and (called := CALLED.search(instruction.text)):
            total.add(count_computation(called[1], computations, done))
        elif instruction.opcode in EXPENSIVE and not any(marker in instruction.text for marker in MARKERS):
            total.unpriced[instruction.opcode] += 1
    done[name] = total
    return total


def trip_count(loop: Instruction, around: Computation, computations: Mapping[str, Computation]) -> int | None:
    """The number of iterations of a loop, if its text says so: it counts from one constant up to another."""
    if known := KNOWN_TRIP_COUNT.search(loop.text):
        return int(known[1])
    names = LOOP.search(loop.text)
    assert names is not None
    condition, body = computations[names[1]], computations[names[2]]
    test = condition.root
    if test is None or test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    elements = operands_of_tuple(around.instructions.get(loop.operands[0]))
    counter, limit = (resolve(name, condition) for name in test.operands)
    if not (isinstance(counter, Element) and step_is_one(body, counter.index)):
        return None
    starts = resolve(elements[counter.index], around) if counter.index < len(elements) else None
    if isinstance(limit, Element):
        limit = resolve(elements[limit.index], around) if limit.index < len(elements) else None
    return max(0, limit - starts) if isinstance(limit, int) and isinstance(starts, int) else None


@dataclass(frozen=True)
class Element:
    """An element of the tuple that a loop carries."""

    index: int


def resolve(name: str, computation: Computation) -> int | Element | None:
    """What a scalar is: a constant, an element of the loop's tuple, or None if neither can be seen."""
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.opcode in VALUE_KEEPING:
        instruction = computation.instructions.get(instruction.operands[0])
    if instruction is None:
        return None
    if instruction.opcode == "constant" and (number := re.match(r"constant\((-?\d+)\)", instruction.text)):
        return int(number[1])
    if instruction.opcode == "get-tuple-element" and (index := re.search(r"index=(\d+)", instruction.text)):
        source = computation.instructions.get(instruction.operands[0])
        return Element(int(index[1])) if source is not None and source.opcode == "parameter" else None
    return None


def operands_of_tuple(instruction: Instruction | None) -> list[str]:
    return instruction.operands if instruction is not None and instruction.opcode == "tuple" else []


def step_is_one(body: Computation, index: int) -> bool:
    elements = operands_of_tuple(body.root)
    update = body.instructions.get(elements[index]) if index < len(elements) else None
    while update is not None and update.opcode in VALUE_KEEPING:
        update = body.instructions.get(update.operands[0])
    if update is None or update.opcode != "add":
        return False
    parts = [resolve(name, body) for name in update.operands]
    return Element(index) in parts and 1 in parts
