"""Compiled HLO text -> cycles. Knows nothing of chips, models or JAX.

libtpu writes its own price beside most operations that it compiles (`estimated_cycles`). Here they are added up: what a
loop holds counts as often as the loop turns, of a branch the dearest side counts, and what a fusion holds is in its
price. A loop whose number of turns only the caller knows counts once. What moves data beside the computation (async
copies) has no price and is taken as hidden behind it.
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
KNOWN_TURNS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')

PASSED_ON = {"copy", "bitcast", "convert", "reshape"}  # of a number: it stays what it was
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
MATTER = (
    *COLLECTIVES,
    "custom-call",
    "sort",
    "fusion",
    "convolution",
    "dot",
    "gather",
    "scatter",
)  # if without a price

MARKERS = ('"AllocateBuffer"', '"AssumeGatherIndicesInBound"', '"GatherScatterIndicesBitpacked"')  # they do nothing


ENDLESS = 1 << 62  # cycles: what libtpu writes where its estimate came to nothing


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    text: str  # from the opcode on
    root: bool

    @property
    def cycles(self) -> int | None:
        found = CYCLES.search(self.text)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """Where in the program's source it comes from: names of functions and scopes, joined by slashes."""
        found = OP_NAME.search(self.text)
        return found[1] if found else ""

    @property
    def operands(self) -> list[str]:
        """Names only; what an operand's type says is not there."""
        opened = self.text.index("(")
        return OPERANDS.findall(self.text[opened : closing(self.text, opened)])


@dataclass(frozen=True)
class Computation:
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction | None:
        return next((one for one in self.instructions.values() if one.root), None)


@dataclass
class Bill:
    """Cycles by op_name; calls of custom kernels, whose price is another's matter; what has no price."""

    cycles: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)  # op_name -> calls
    kernel_cycles: Counter[str] = field(default_factory=Counter)  # op_name -> the kernels' own estimates
    unpriced: Counter[str] = field(default_factory=Counter)  # opcode -> how many
    open_loops: int = 0  # that count as one turn, because their text does not say how many they take

    def add(self, other: "Bill", times: int = 1) -> None:
        for name in ("cycles", "kernels", "kernel_cycles", "unpriced"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += value * times
        self.open_loops += other.open_loops

    @property
    def total(self) -> int:
        return self.cycles.total() + self.kernel_cycles.total()


def bill(text: str) -> Bill:
    """Of a compiled program, as `Compiled.as_text()` has it."""
    computations, entry = parse(text)
    return charge(entry, computations, {})


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the entry's name."""
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
        elif found := INSTRUCTION.match(line):
            opcode = OPCODE.search(after_type(found[3]))
            if opcode:
                rest = after_type(found[3])[opcode.start(1) :]
                instructions[found[2]] = Instruction(found[2], opcode[1], rest, bool(found[1]))
    if not entry:
        raise ValueError("the text holds no ENTRY computation: it is not a compiled program.")
    return computations, entry


def after_type(text: str) -> str:
    """`(f32[2], s32[]) while(...)` -> `while(...)`: a tuple's type has parentheses of its own."""
    return " " + (text[closing(text, 0) + 1 :] if text.startswith("(") else text.partition(" ")[2])


def closing(text: str, opened: int) -> int:
    """Where the parenthesis that opens at `opened` closes."""
    depth = 0
    for at in range(opened, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    return len(text) - 1


def charge(name: str, computations: Mapping[str, Computation], done: dict[str, Bill]) -> Bill:
    if name in done:
        return done[name]
    total = Bill()
    for one in computations[name].instructions.values() if name in computations else ():
        if one.opcode == "while" and (loop := LOOP.search(one.text)):
            turns = turns_of(one, computations[name], computations)
            total.add(charge(loop[2], computations, done), 1 if turns is None else turns)
            total.open_loops += turns is None
        elif one.opcode == "conditional" and (found := BRANCHES.search(one.text)):
            sides = OPERANDS.findall(found[1]) if found[1] else [found[2], found[3]]
            total.add(max((charge(side, computations, done) for side in sides), key=lambda side: side.total))
        elif one.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in one.text:
            total.kernels[one.op_name] += 1
            total.kernel_cycles[one.op_name] += one.cycles or 0
        elif (cycles := one.cycles) is not None:
            if cycles < ENDLESS:
                total.cycles[one.op_name] += cycles
            else:
                total.unpriced[one.opcode] += 1
        elif one.opcode in ("fusion", "call", "async-start") and (called := CALLED.search(one.text)):
            total.add(charge(called[1], computations, done))
        elif one.opcode in MATTER and not any(marker in one.text for marker in MARKERS):
            total.unpriced[one.opcode] += 1
    done[name] = total
    return total


def turns_of(loop: Instruction, around: Computation, computations: Mapping[str, Computation]) -> int | None:
    """How often a loop turns, if its text says so: a counter from one constant up to another."""
    if known := KNOWN_TURNS.search(loop.text):
        return int(known[1])
    names = LOOP.search(loop.text)
    assert names is not None
    condition, body = computations[names[1]], computations[names[2]]
    test = condition.root
    if test is None or test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    elements = operands_of_tuple(around.instructions.get(loop.operands[0]), around)
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
    """What a number is: a constant, an element of the loop's tuple, or neither that one can see."""
    one = computation.instructions.get(name)
    while one is not None and one.opcode in PASSED_ON:
        one = computation.instructions.get(one.operands[0])
    if one is None:
        return None
    if one.opcode == "constant" and (number := re.match(r"constant\((-?\d+)\)", one.text)):
        return int(number[1])
    if one.opcode == "get-tuple-element" and (index := re.search(r"index=(\d+)", one.text)):
        source = computation.instructions.get(one.operands[0])
        return Element(int(index[1])) if source is not None and source.opcode == "parameter" else None
    return None


def operands_of_tuple(one: Instruction | None, around: Computation) -> list[str]:
    return one.operands if one is not None and one.opcode == "tuple" else []


def step_is_one(body: Computation, index: int) -> bool:
    root = body.root
    elements = operands_of_tuple(root, body)
    more = body.instructions.get(elements[index]) if index < len(elements) else None
    while more is not None and more.opcode in PASSED_ON:
        more = body.instructions.get(more.operands[0])
    if more is None or more.opcode != "add":
        return False
    parts = [resolve(name, body) for name in more.operands]
    return Element(index) in parts and 1 in parts
