"""Reads the HLO text of a compiled program. Knows nothing of costs, chips, models or JAX."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
COMPUTATION_END = re.compile(r"^\}(?:, execution_thread=.*)?$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
OP_NAME = re.compile(r'op_name="([^"]*)"')
OPERANDS = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"(?:calls|to_apply|called_computation|async_computation)=%?([\w.\-]+)")
DIMENSIONS = re.compile(r"^[a-z]\w*\[([\d,]*)\]")
LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)
KNOWN_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"?(\d+)')

VALUE_KEEPING = {"copy", "bitcast", "convert", "reshape"}  # opcodes that do not change a scalar


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    type: str  # of its result
    text: str  # from the opcode on
    root: bool

    @property
    def cycles(self) -> int | None:
        match = CYCLES.search(self.text)
        return int(match[1]) if match else None

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The sides of its result; empty for a scalar and for a tuple."""
        match = DIMENSIONS.match(self.type)
        return tuple(int(side) for side in match[1].split(",")) if match and match[1] else ()

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


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns all computations by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    entry, inside = "", None
    lines: list[str] = []
    for line in text.splitlines():
        if inside is None:
            if opened := COMPUTATION.match(line):
                inside, lines = opened[2], []
                entry = inside if opened[1] else entry
        elif COMPUTATION_END.match(line):
            computations[inside] = Computation({instruction.name: instruction for instruction in instructions(lines)})
            inside = None
        elif INSTRUCTION.match(line) or not lines:
            lines.append(line)
        else:
            lines[-1] += line  # an attribute may hold line breaks, as the metadata of splash attention does
    if not entry:
        raise ValueError("the text holds no ENTRY computation: it is not a compiled program.")
    return computations, entry


def instructions(lines: list[str]) -> Iterator[Instruction]:
    for line in lines:
        if match := INSTRUCTION.match(line):
            root, name, value = match.groups()
            type_, operation = split_type(value)
            if opcode := OPCODE.search(operation):
                yield Instruction(name, opcode[1], type_, operation[opcode.start(1) :], bool(root))


def split_type(text: str) -> tuple[str, str]:
    """`(f32[2], s32[]) while(...)` -> its type and ` while(...)`. The type of a tuple has parentheses too."""
    end = closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    return text[:end], text[end:]


def closing(text: str, opened: int) -> int:
    """The index of the parenthesis that closes the one at index `opened`."""
    depth = 0
    for index in range(opened, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index
    return len(text) - 1


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
