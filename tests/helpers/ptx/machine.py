"""A launch, executed: all threads of the grid as NumPy vectors.

Warps that stand at the same instruction take it together, as one vector ("together"); or every
warp goes alone, in an order drawn at random, from one branch, barrier or atomic to the next
("alone"). Both are schedules that a GPU may choose: the results must not differ.
"""

import numpy as np

from . import arithmetic
from .faults import Divergence, Fault, Uninitialised, UnknownInstruction
from .memory import Global, Shared
from .order import Order
from .parse import Address, Instruction, Program

WARP = 32
SHARED = 1 << 10  # where shared memory begins, so that 0 is no address of it
POISON = {np.bool_: False, np.uint16: 0x7FC1, np.uint32: 0x7FC0DEAD, np.uint64: 0x7FF8DEAD7FC0DEAD}
REGISTERS = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64}
RUNNING, WAITING, DONE = 0, 1, 2


def register_type(name: str) -> type:
    prefix = name.rstrip("0123456789")
    if prefix not in REGISTERS:
        raise UnknownInstruction(f"register {name}")
    return REGISTERS[prefix]


class Machine:
    """Executes `program` over `ctas` CTAs.

    Args:
        parameters: the kernel's, as unsigned numbers, in the program's order.
        memory: global memory.
        shared: bytes of shared memory for each CTA.
        together: the schedule, as above.
        random: the numpy Generator that orders the warps.
    """

    def __init__(self, program: Program, ctas: int, parameters: list[int], shared: int,
                 memory: Global, order: Order, together: bool, random):
        self.program, self.together, self.random = program, together, random
        self.threads = program.threads
        self.warps = self.threads // WARP  # of one CTA
        self.parameters = dict(zip(program.parameters, parameters, strict=True))
        self.memory, self.order = memory, order
        self.shared = Shared(ctas, shared, program.narrowest("shared", "shared_cta"), order, WARP,
                             self.threads)
        thread = np.arange(ctas * self.threads, dtype=np.uint32)
        self.registers = {
            "%tid.x": thread % self.threads, "%ctaid.x": thread // self.threads,
            "%nctaid.x": np.full_like(thread, ctas), "%ntid.x": np.full_like(thread, self.threads),
            "%laneid": thread % WARP}
        self.all = thread.astype(np.int64)
        self.pc = np.zeros(ctas * self.warps, np.int64)
        self.state = np.full(ctas * self.warps, RUNNING)
        self.joins = {program.labels[i.operands[0]] for i in program.code if i.opcode[0] == "bra"}

    def run(self) -> None:
        """To the end of every thread.

        Raises:
            Fault: one of its kinds, at the instruction that shows it.
        """
        with np.errstate(all="ignore"):
            while (ready := np.flatnonzero(self.state == RUNNING)).size:
                self._advance(self._choose(ready))
                self._open_barriers()
        if (self.state == WAITING).any():
            raise Divergence(f"{self.program.name}: {(self.state == WAITING).sum()} warps wait at "
                             "a barrier that others of their CTA never reach")
        self.shared.shadow.find_races()
        self.memory.shadow.find_races()

    def _choose(self, ready: np.ndarray) -> np.ndarray:
        if self.together:  # those furthest behind, so that the others are met where paths join
            return ready[self.pc[ready] == self.pc[ready].min()]
        return self.random.choice(ready, 1)

    def _open_barriers(self) -> None:
        for cta in np.unique(np.flatnonzero(self.state == WAITING) // self.warps):
            warps = np.arange(cta * self.warps, (cta + 1) * self.warps)
            if (self.state[warps] == RUNNING).any():
                continue
            if (self.state[warps] == DONE).any() or len(set(self.pc[warps])) > 1:
                raise Divergence(f"{self.program.name}: the warps of CTA {cta} wait at different "
                                 "barriers, or some have left")
            self.order.barrier(warps)
            self.state[warps] = RUNNING

    def _advance(self, warps: np.ndarray) -> None:
        """Up to a branch, a barrier, an atomic, the end, or a place where paths join."""
        threads = (warps[:, None] * WARP + np.arange(WARP)).ravel()
        pc = int(self.pc[warps[0]])
        while True:
            i = self.program.code[pc]
            try:
                step = Step(self, i, threads, len(threads) == len(self.all))
                going_on = step.execute(warps)
            except Fault as fault:
                raise type(fault)(f"{self.program.name}: {fault}") from None
            pc += 1
            if not going_on:
                return
            self.pc[warps] = pc
            if pc in self.joins:
                return


class Step:
    """One instruction, for some threads."""

    def __init__(self, machine: Machine, i: Instruction, threads: np.ndarray, whole: bool):
        self.machine, self.i, self.threads, self.whole = machine, i, threads, whole
        self.on = None
        if i.predicate:
            self.on = self.read(i.predicate, "pred") ^ i.negated

    def execute(self, warps: np.ndarray) -> bool:
        """Whether the warps go straight on."""
        name = self.i.opcode[0]
        if name in ("bra", "ret", "exit", "bar", "barrier", "atom"):
            self.machine.pc[warps] += 1
            getattr(self, "_" + name)(warps)
            return False
        handler = getattr(self, "_" + name, None)
        (handler or self._compute)()
        return True

    # ---- operands

    def read(self, operand, kind: str):
        """The operand's bits for these threads."""
        if isinstance(operand, str):
            if operand == "global_smem":
                return np.full(len(self.threads), SHARED, np.uint32)
            values = self.machine.registers.get(operand)
            if values is None:
                raise Uninitialised(f"{self.i.text}: {operand} is read before it is written")
            return values if self.whole else values[self.threads]
        if isinstance(operand, int):
            size = np.dtype(arithmetic.word(kind)).itemsize * 8
            return np.full(len(self.threads), operand & ((1 << size) - 1), arithmetic.word(kind))
        raise UnknownInstruction(self.i.text)

    def numbers(self, operand, kind: str):
        bits = self.read(operand, kind)
        if kind != "pred" and bits.dtype.itemsize != np.dtype(arithmetic.word(kind)).itemsize:
            raise UnknownInstruction(f"{self.i.text}: {operand} is no .{kind}")
        return arithmetic.decode(bits, kind)

    def write(self, register: str, values) -> None:
        """A register's array is never changed in place: others may share it."""
        if register == "_":
            return
        values = np.asarray(values)
        if values.dtype != register_type(register):
            raise UnknownInstruction(f"{self.i.text}: {values.dtype} into {register}")
        if self.whole and self.on is None:
            self.machine.registers[register] = values
            return
        old = self.machine.registers.get(register)
        if old is None:
            old = np.full(len(self.machine.all), POISON[values.dtype.type], values.dtype)
        new = old.copy()
        if self.on is None:
            new[self.threads] = values
        else:
            new[self.threads[self.on]] = values[self.on]
        self.machine.registers[register] = new

    def active(self) -> np.ndarray:
        return self.threads if self.on is None else self.threads[self.on]

    def address(self, operand: Address):
        if operand.base == "global_smem":
            base = np.full(len(self.threads), SHARED, np.uint32)
        else:
            base = self.read(operand.base, "b64")
        base = base if self.on is None else base[self.on]
        return base + np.array(operand.offset, np.int64).astype(base.dtype)

    def together(self) -> None:
        """All lanes of a warp, or none, as instructions for a whole warp need."""
        if self.on is not None:
            lanes = self.on.reshape(-1, WARP)
            if (lanes.any(axis=1) != lanes.all(axis=1)).any():
                raise Divergence(f"{self.i.text}: for some lanes of a warp alone")

    # ---- control

    def _bra(self, warps) -> None:
        target = self.machine.program.labels[self.i.operands[0]]
        taken = np.ones(len(warps), bool)
        if self.on is not None:
            self.together()
            taken = self.on.reshape(-1, WARP)[:, 0]
        self.machine.pc[warps[taken]] = target

    def _ret(self, warps) -> None:
        if self.on is not None:
            raise UnknownInstruction(self.i.text)
        self.machine.state[warps] = DONE

    _exit = _ret

    def _bar(self, warps) -> None:
        if self.on is not None:
            raise Divergence(f"{self.i.text}: a barrier for some threads alone")
        if self.i.opcode == ("bar", "warp", "sync"):
            self.machine.order.phase = self.machine.order.phase.copy()
            self.machine.order.phase[warps] += 1
        elif self.i.opcode == ("bar", "sync") and self.i.operands == (0,):
            self.machine.state[warps] = WAITING
        else:
            raise UnknownInstruction(self.i.text)

    def _atom(self, warps) -> None:
        """atom.global.gpu.acq_rel.add.u32: one thread after the other, in a drawn order."""
        _, space, scope, sem, what, kind = self.i.opcode
        if (space, what, kind) != ("global", "add", "u32"):
            raise UnknownInstruction(self.i.text)
        target, address, operand = self.i.operands
        target = target[0] if isinstance(target, tuple) else target
        threads = self.active()
        at = self.machine.memory.atomic(self.i.text, threads, self.address(address), 4)
        amount = self.read(operand, kind)
        amount = amount if self.on is None else amount[self.on]
        words = self.machine.memory.words(4)
        before = np.zeros(len(threads), np.uint32)
        across = scope in ("gpu", "sys")
        for n in self.machine.random.permutation(len(threads)):
            before[n] = words[at[n]]
            words[at[n]] += amount[n]
            self.machine.order.atomic(int(threads[n]) // WARP, int(at[n]),
                                      across and sem in ("acq_rel", "acquire"),
                                      across and sem in ("acq_rel", "release"))
        whole = np.zeros(len(self.threads), np.uint32)
        whole[slice(None) if self.on is None else self.on] = before
        self.write(target, whole)

    # ---- memory

    def _ld(self) -> None:
        if self.i.opcode[1] == "param":
            return self._ld_param()
        space, width, count = self._space()
        targets, address = self.i.operands
        targets = targets if isinstance(targets, tuple) else (targets,)
        values = space.load(self.i.text, self.active(), self._offset(address), width, count)
        for target, value in zip(targets, values, strict=True):
            whole = value
            if self.on is not None:
                whole = np.zeros(len(self.threads), value.dtype)
                whole[self.on] = value
            self.write(target, whole)

    def _ld_param(self) -> None:
        target, address = self.i.operands
        kind = self.i.opcode[-1]
        bits = np.array(self.machine.parameters[address.base], np.uint64)
        value = arithmetic.decode(bits.astype(arithmetic.word(kind)), kind)
        self.write(target, np.full(len(self.threads), value.astype(register_type(target))))

    def _st(self) -> None:
        space, width, count = self._space()
        address, sources = self.i.operands
        sources = sources if isinstance(sources, tuple) else (sources,)
        if len(sources) != count:
            raise UnknownInstruction(self.i.text)
        values = [self.read(s, f"b{8 * width}") for s in sources]
        values = values if self.on is None else [v[self.on] for v in values]
        space.store(self.i.text, self.active(), self._offset(address), width, values)

    def _space(self) -> tuple:
        """The memory of a load or store, the bytes of an element, and the number of elements."""
        _, space, *hints, kind = self.i.opcode
        if set(hints) - {"v2", "v4", "v8"} or space not in ("global", "shared", "shared_cta"):
            raise UnknownInstruction(self.i.text)
        memory = self.machine.memory if space == "global" else self.machine.shared
        width = np.dtype(arithmetic.word(kind)).itemsize
        return memory, width, self.i.bytes // width

    def _offset(self, address: Address):
        """A global address, or a shared one from the beginning of shared memory."""
        value = self.address(address)
        return value if self.i.opcode[1] == "global" else value - np.uint32(SHARED)

    def _ldmatrix(self) -> None:
        """Four 8x8 matrices of 16-bit elements: lanes 8k to 8k + 7 give the rows of matrix k, and
        lane l gets the elements 2 (l % 4) and the next of row l / 4 of each."""
        if self.i.opcode != ("ldmatrix", "sync", "aligned", "m8n8", "x4", "shared", "b16"):
            raise UnknownInstruction(self.i.text)
        self.together()
        targets, address = self.i.operands
        rows = self.machine.shared.load(self.i.text, self.threads, self._offset(address), 4, 4)
        rows = np.stack(rows, axis=1).reshape(-1, 4, 8, 4)  # warp, matrix, row, pair
        for matrix, target in enumerate(targets):
            self.write(target, np.ascontiguousarray(rows[:, matrix].reshape(-1)))

    def _shfl(self) -> None:
        target, source, by, clamp, members = self.i.operands
        if self.i.opcode != ("shfl", "sync", "bfly", "b32") or (clamp, members) != (31, -1):
            raise UnknownInstruction(self.i.text)
        self.together()
        lanes = self.read(source, "b32").reshape(-1, WARP)
        self.write(target, lanes[:, np.arange(WARP) ^ by].reshape(-1))

    # ---- registers

    def _mov(self) -> None:
        target, source = self.i.operands
        kind = self.i.opcode[1]
        if isinstance(target, tuple):
            low, high = target
            bits = self.read(source, kind)
            self.write(low, bits.astype(np.uint16))
            return self.write(high, (bits >> np.uint32(16)).astype(np.uint16))
        if isinstance(source, tuple):
            low, high = (self._half(s).astype(np.uint32) for s in source)
            return self.write(target, low | high << np.uint32(16))
        return self.write(target, self.read(source, kind))

    def _half(self, register):
        """16 bits to be packed; poison where nothing was written: the compiler packs a number
        beside nothing, and takes it out again."""
        if isinstance(register, str) and register not in self.machine.registers:
            return np.full(len(self.threads), POISON[np.uint16], np.uint16)
        return self.read(register, "b16")

    def _selp(self) -> None:
        target, a, b, condition = self.i.operands
        kind = self.i.opcode[1]
        self.write(target, np.where(self.read(condition, "pred"), self.read(a, kind),
                                    self.read(b, kind)))

    def _setp(self) -> None:
        _, how, *combined, kind = self.i.opcode
        target, a, b, *other = self.i.operands
        if kind in ("f16x2", "bf16x2"):
            return self._setp_both(how, kind[:-2], target, a, b, combined)
        found = arithmetic.compare(how, kind, self.numbers(a, kind), self.numbers(b, kind))
        for name in combined:
            found = arithmetic.LOGIC[name](found, self.read(other[0], "pred"))
        return self.write(target, found)

    def _setp_both(self, how, kind, targets, a, b, combined) -> None:
        if combined:
            raise UnknownInstruction(self.i.text)
        a, b = self.read(a, "b32"), self.read(b, "b32")
        for shift, target in zip((0, 16), targets, strict=True):
            halves = ((x >> np.uint32(shift)).astype(np.uint16) for x in (a, b))
            self.write(target, arithmetic.compare(
                how, kind, *(arithmetic.decode(h, kind) for h in halves)))

    def _cvt(self) -> None:
        _, *how, to, kind = self.i.opcode
        target, *sources = self.i.operands
        values = [self.numbers(s, kind) for s in sources]
        if to in ("bf16x2", "f16x2"):  # the first source is the upper half
            high, low = (arithmetic.convert(tuple(how), to[:-2], v).astype(np.uint32)
                         for v in values)
            return self.write(target, low | high << np.uint32(16))
        value = values[0]
        if arithmetic.is_float(kind) == arithmetic.is_float(to) is False:
            bits = np.dtype(arithmetic.word(to)).itemsize
            value = value.astype(np.dtype(f"{value.dtype.kind}{bits}"))
        return self.write(target, arithmetic.convert(tuple(how), to, value))

    def _abs(self) -> None:
        target, source = self.i.operands
        kind = self.i.opcode[1]
        if kind in ("bf16x2", "f16x2", "bf16", "f16"):
            mask = np.uint32(0x7FFF7FFF) if kind.endswith("x2") else np.uint16(0x7FFF)
            return self.write(target, self.read(source, kind) & mask)
        return self._compute()

    def _compute(self) -> None:
        target, *sources = self.i.operands
        name, kind = self.i.opcode[:-1], self.i.opcode[-1]
        function = arithmetic.function(self.i.opcode)
        kinds = [kind] * len(sources)
        if name[0] in ("shl", "shr"):
            kinds[1] = "u32"
        result = kind
        if "wide" in name:
            result = kind[0] + str(2 * int(kind[1:]))
            kinds[2:] = [result] * len(sources[2:])
        values = function(*(self.numbers(s, k) for s, k in zip(sources, kinds, strict=True)))
        self.write(target, arithmetic.encode(values, result))
