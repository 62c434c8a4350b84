"""What the executed code may do wrong: one class for each check."""


class Fault(Exception):
    """Code that a GPU might run with another result, or not at all."""


class UnknownInstruction(Fault):
    """An instruction, operand or directive that the machine does not know."""


class OutOfBounds(Fault):
    """An access outside the tensor that its address was made from, or in a gap of it."""


class Misaligned(Fault):
    """An access at an address that is no multiple of its whole width."""


class Uninitialised(Fault):
    """Shared memory, or a register, read before it was written."""


class Divergence(Fault):
    """Threads apart where they must be together: in a warp, or at a barrier."""


class Race(Fault):
    """Two accesses to the same byte, one of them a write, that nothing orders."""
