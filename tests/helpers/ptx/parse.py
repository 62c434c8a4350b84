"""PTX text -> a list of instructions."""

import re
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from .faults import UnknownInstruction


class Address(NamedTuple):
    """[base + offset]; base is a register, a parameter or the shared memory's symbol."""

    base: str
    offset: int


@dataclass(frozen=True)
class Instruction:
    """opcode is split at the dots; an operand is a register's name, an int (an immediate, floats
    as their bits), an Address, or a tuple of operands."""

    text: str
    opcode: tuple[str, ...]
    operands: tuple
    predicate: str | None = None
    negated: bool = False

    @property
    def bytes(self) -> int:
        """What a memory instruction moves for each thread."""
        if self.opcode[0] == "ldmatrix":
            return 16
        vector = [int(part[1:]) for part in self.opcode if re.fullmatch(r"v\d", part)]
        return int(self.opcode[-1][1:]) // 8 * (vector or [1])[0]


@dataclass
class Program:
    name: str
    parameters: list[str] = field(default_factory=list)
    threads: int = 0
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


    def narrowest(self, *spaces: str) -> int:
        """Bytes of the narrowest access to these memories."""
        return min((i.bytes for i in self.code if i.opcode[0] in ("ld", "st", "atom", "ldmatrix")
                    and set(i.opcode) & set(spaces)), default=16)


PREDICATED = re.compile(r"@(!?)(%p\d+)\s+(.*)", re.S)
DECLARATIONS = (".reg", ".loc", ".pragma", ".maxnreg", ".minnctapersm")


@cache
def parse(text: str) -> Program:
    """The one kernel in `text`.

    Raises:
        UnknownInstruction: something that is neither an instruction, a label nor a declaration.
    """
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{(.*?)\n\}", text, re.S)
    name, parameters, bounds, body = entry.groups()
    program = Program(name, re.findall(r"(\w+)\s*(?:,|$)", parameters.strip()))
    program.threads = int(re.search(r"\.reqntid\s+(\d+)", bounds)[1])
    for statement in statements(body):
        if statement.endswith(":"):
            program.labels[statement[:-1]] = len(program.code)
        elif not statement.startswith(DECLARATIONS):
            program.code.append(instruction(statement))
    return program


def statements(body: str) -> list[str]:
    """A label with its colon, or a statement without its semicolon, each."""
    body = re.sub(r"^(\s*\$?\w+:)", r"\1;", body, flags=re.M)
    body = re.sub(r"^\s*(\.loc[^\n]*)", r"\1;", body, flags=re.M)
    return [s.strip() for s in body.split(";") if s.strip()]


def instruction(text: str) -> Instruction:
    found = PREDICATED.fullmatch(text)
    negated, predicate, rest = found.groups() if found else ("", None, text)
    if not re.match(r"[a-z]", rest):
        raise UnknownInstruction(text)
    opcode, _, operands = rest.replace("\t", " ").partition(" ")
    return Instruction(text, tuple(opcode.replace("::", "_").split(".")),
                       tuple(operand(o) for o in split(operands)), predicate, bool(negated))


def split(operands: str) -> list[str]:
    """At the commas that are outside of braces."""
    return [o.strip() for o in re.findall(r"(?:\{[^}]*\}|[^,{])+", operands) if o.strip()]


def operand(text: str):
    if text.startswith("{"):
        return tuple(operand(o) for o in split(text[1:-1]))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset or 0))
    if "|" in text:
        return tuple(operand(o) for o in text.split("|"))
    if re.fullmatch(r"0[fd][0-9A-Fa-f]+", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    if re.fullmatch(r"[%$\w.]+", text):
        return text
    raise UnknownInstruction(f"operand {text!r}")
