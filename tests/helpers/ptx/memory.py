"""Global and shared memory as a launch sees it, every access checked before it is made.

A kernel gets addresses with a tag in the upper 16 bits: the number of the tensor that the address
was made for. Arithmetic carries the tag along, so that an access knows which tensor it is meant
for, wherever it ends up. An address that is read from a table is tagged as it is loaded.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .faults import Misaligned, OutOfBounds, Race, Uninitialised
from .order import Order

TAG = 48
REAL = (1 << TAG) - 1
SECTOR = 5  # bits: DRAM and caches move 32 bytes
PAGE = 12
LOWEST = 1 << PAGE  # nothing lives below
POISON = 0xFF  # NaN in every floating type
WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Everything(NamedTuple):
    """The process's memory from LOWEST on, as one array."""

    dtype: type

    @property
    def __array_interface__(self) -> dict:
        size = np.dtype(self.dtype).itemsize
        return {"data": (LOWEST, False), "shape": ((2**47 - LOWEST) // size,), "version": 3,
                "typestr": np.dtype(self.dtype).str}


PROCESS = {size: np.asarray(Everything(word)) for size, word in WORD.items()}


PLACE, NUMBER, THREAD, CLOCK, PHASE, WRITE, ATOMIC = range(7)


class Access(NamedTuple):
    """One instruction's accesses: a shadow index and a thread each, all of one size in bytes."""

    text: str
    index: np.ndarray
    size: int
    threads: np.ndarray
    write: bool
    atomic: bool
    clock: np.ndarray
    phase: np.ndarray


class Shadow:
    """For every granule: who touched it and whether it was written; and the log of all accesses.

    Args:
        size: in bytes.
        granule: bytes, a power of 2; the narrowest access of the code, of which every other covers
            whole ones. (A fixed one of 4 would see races between neighbouring 16-bit elements.)
    """

    def __init__(self, size: int, granule: int, order: Order, warp: int):
        self.owner = np.zeros(size // granule, np.int32)  # 0 nobody, -1 several, or thread + 1
        self.written = np.zeros(size // granule, bool)
        self.granule, self.order, self.warp = granule, order, warp
        self.log: list[Access] = []

    def grow(self, size: int) -> None:
        more = np.zeros(size // self.granule, np.int32)
        self.owner = np.concatenate([self.owner, more])
        self.written = np.concatenate([self.written, more.astype(bool)])

    def granules(self, index: np.ndarray, size: int) -> np.ndarray:
        """All those of each access: (accesses, granules)."""
        return index[:, None] // self.granule + np.arange(size // self.granule)

    def note(self, text, index, size, threads, write, atomic=False) -> None:
        self.log.append(Access(text, index, size, threads, write, atomic,
                               self.order.clock, self.order.phase))
        at = self.granules(index, size).ravel()
        who = np.repeat(threads.astype(np.int32) + 1, size // self.granule)
        before = self.owner[at]
        self.owner[at] = who
        shared = (self.owner[at] != who) | ((before != 0) & (before != who))
        self.owner[at[shared]] = -1
        if write:
            self.written[at] = True

    def find_races(self) -> None:
        """Raise Race where two threads touch a byte, one writes it, and neither precedes."""
        doubtful = (self.owner == -1) & self.written
        if not doubtful.any():
            return
        rows = self._accesses_of(doubtful)
        rows = rows[:, np.argsort(rows[0], kind="stable")]
        writes = np.flatnonzero(rows[WRITE])
        first, last = (np.searchsorted(rows[PLACE], rows[PLACE][writes], side)
                       for side in ("left", "right"))
        counts = last - first
        others = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - first, counts)
        self._judge(rows, np.repeat(writes, counts), others)

    def _accesses_of(self, doubtful) -> np.ndarray:
        """A column for each access of a doubtful granule, with the rows PLACE to ATOMIC."""
        columns = []
        for number, a in enumerate(self.log):
            at = self.granules(a.index, a.size)
            which, part = np.nonzero(doubtful[at])
            warps = a.threads[which] // self.warp
            rows = np.empty((7, len(which)), np.int64)
            rows[PLACE], rows[NUMBER], rows[THREAD] = at[which, part], number, a.threads[which]
            rows[CLOCK], rows[PHASE] = a.clock[warps], a.phase[warps]
            rows[WRITE], rows[ATOMIC] = a.write, a.atomic
            columns.append(rows)
        return np.concatenate(columns, axis=1)

    def _judge(self, rows, mine, other) -> None:
        """Of pairs of columns, one of them a write, raise the first that nothing orders."""
        later = rows[NUMBER, mine] > rows[NUMBER, other]
        a = rows[:, np.where(later, other, mine)]
        b = rows[:, np.where(later, mine, other)]
        warp_a, warp_b = a[THREAD] // self.warp, b[THREAD] // self.warp
        apart = (a[THREAD] != b[THREAD]) & ~((a[ATOMIC] & b[ATOMIC]) == 1)
        lanes = apart & (warp_a == warp_b) & (a[PHASE] == b[PHASE])
        lanes &= a[NUMBER] != b[NUMBER]  # one store of several lanes: judged by its values
        warps = np.flatnonzero(apart & (warp_a != warp_b))
        ordered = self.order.precedes(warp_a[warps], a[CLOCK, warps],
                                      warp_b[warps], b[CLOCK, warps])
        found = np.concatenate([np.flatnonzero(lanes), warps[~ordered]])
        if found.size:
            one, two = (f"{self.log[x[NUMBER, found[0]]].text!r} of thread {x[THREAD, found[0]]}"
                        for x in (a, b))
            raise Race(f"nothing orders {one} and {two}")


def write_words(text: str, words: np.ndarray, index: np.ndarray, values: list) -> None:
    """Lanes of a warp may write the same place at once if they write the same."""
    for i, value in enumerate(values):
        words[index + i] = value
        if (words[index + i] != value).any():
            raise Race(f"{text}: threads write different values to one place")


class Shared:
    """Every CTA's shared memory, full of poison until it is written."""

    def __init__(self, ctas: int, size: int, granule: int, order: Order, warp: int,
                 threads: int):
        self.size, self.stride, self.threads = size, -(-size // 16) * 16, threads
        self.data = np.full(ctas * self.stride, POISON, np.uint8)
        self.shadow = Shadow(ctas * self.stride, granule, order, warp)
        self.texts: dict[str, int] = {}
        self.writer = np.full(ctas * self.stride, -1, np.int32)  # of a byte: which of the texts

    def at(self, text, threads, address, size: int) -> np.ndarray:
        """Where in `data` the accesses go."""
        address = address.astype(np.int64)
        if (address + size > self.size).any():
            raise OutOfBounds(f"{text}: byte {address.max() + size} of {self.size} shared ones")
        if (address % size).any():
            raise Misaligned(f"{text}: shared address {address[address % size != 0][0]}")
        return threads // self.threads * self.stride + address

    def load(self, text, threads, address, width: int, count: int = 1) -> list[np.ndarray]:
        index = self.at(text, threads, address, width * count)
        self.shadow.note(text, index, width * count, threads, write=False)
        if not self.shadow.written[self.shadow.granules(index, width * count)].all():
            raise Uninitialised(f"{text}: shared memory that nobody has written")
        words = self.data.view(WORD[width])
        return [words[index // width + i] for i in range(count)]

    def store(self, text, threads, address, width: int, values: list) -> None:
        """Warps that hold the same numbers store them to the same place, by one instruction: they
        count as one of them, as long as the bits are the same."""
        index, words = self.at(text, threads, address, width * len(values)), self.data.view(
            WORD[width])
        number = self.texts.setdefault(text, len(self.texts))
        again = self.writer[index] == number
        for i, value in enumerate(values):
            again &= words[index // width + i] == value
        news = np.zeros(len(index), bool)
        news[np.unique(index, return_index=True)[1]] = True
        news &= ~again
        self.shadow.note(text, index[news], width * len(values), threads[news], write=True)
        self.writer[index] = number
        write_words(text, words, index // width, values)


class Global:
    """The tensors of a launch.

    Args:
        extent: the size in bytes of the tensor at an address; None where there is none.
        gaps: (start, end) addresses that belong to no tensor's elements, sorted.
    """

    def __init__(self, extent: Callable[[int], int | None], gaps: np.ndarray, granule: int,
                 order: Order, warp: int):
        self.extent, self.gaps, self.warp = extent, gaps, warp
        self.labels, self.tags = [""], {}
        self.start, self.length = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self.pages = np.zeros(0, np.int64)  # sorted, and where the shadow has each
        self.place = np.zeros(0, np.int64)
        self.shadow = Shadow(0, granule, order, warp)
        self.sectors: Counter = Counter()

    def tag(self, address: int, size: int, label: str) -> int:
        """The address that the kernel gets for a tensor."""
        number = self.tags.setdefault((address, size, label), len(self.labels))
        if number == len(self.labels):
            self.labels.append(label)
            self.start = np.append(self.start, address)
            self.length = np.append(self.length, size)
        return address | number << TAG

    def _tag_loaded(self, values: np.ndarray, label: str) -> np.ndarray:
        for value in np.unique(values):
            if value > LOWEST and (size := self.extent(int(value))) is not None:
                values = np.where(values == value, self.tag(int(value), size, label), values)
        return values

    def _check(self, text, address, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The real addresses and the tensors' numbers."""
        tag, real = (address >> np.uint64(TAG)).astype(np.int64), address & np.uint64(REAL)
        real = real.astype(np.int64)
        known = (tag > 0) & (tag < len(self.labels))
        if (real % size).any():
            i = np.flatnonzero(real % size)[0]
            raise Misaligned(f"{text}: {size} bytes at {real[i]:#x}")
        offset = real - self.start[np.where(known, tag, 0)]
        bad = ~known | (offset < 0) | (offset + size > self.length[np.where(known, tag, 0)])
        if bad.any():
            i = np.flatnonzero(bad)[0]
            raise OutOfBounds(f"{text}: {bad.sum()} of {len(bad)} threads; " + (
                f"{size} bytes at {offset[i]} of the {self.length[tag[i]]} of "
                f"{self.labels[tag[i]]!r}" if known[i] else f"{address[i]:#x} is no tensor's"))
        if len(self.gaps):
            after = np.searchsorted(self.gaps[:, 1], real, "right")
            gap = self.gaps[np.minimum(after, len(self.gaps) - 1)]
            if (inside := (after < len(self.gaps)) & (gap[:, 0] < real + size)).any():
                i = np.flatnonzero(inside)[0]
                raise OutOfBounds(f"{text}: {size} bytes at {offset[i]} of "
                                  f"{self.labels[tag[i]]!r}, in a gap between its parts")
        return real, tag

    def _index(self, real: np.ndarray) -> np.ndarray:
        page = real >> PAGE
        new = np.setdiff1d(page, self.pages)
        if len(new):
            pages = np.concatenate([self.pages, new])
            place = np.concatenate([self.place, len(self.pages) + np.arange(len(new))])
            order = np.argsort(pages)
            self.pages, self.place = pages[order], place[order]
            self.shadow.grow(len(new) << PAGE)
        return (self.place[np.searchsorted(self.pages, page)] << PAGE) + (real & (LOWEST - 1))

    def _count(self, address, threads, way: str) -> None:
        """Every warp's distinct sectors."""
        key = np.stack([address >> np.uint64(SECTOR), (threads // self.warp).astype(np.uint64)])
        order = np.lexsort(key)
        key = key[:, order]
        new = np.ones(key.shape[1], bool)
        new[1:] = (key[:, 1:] != key[:, :-1]).any(axis=0)
        tags = np.bincount((key[0, new] >> np.uint64(TAG - SECTOR)).astype(np.int64))
        for number in np.flatnonzero(tags):
            self.sectors[self.labels[number], way] += int(tags[number])

    def load(self, text, threads, address, width: int, count: int = 1) -> list[np.ndarray]:
        real, tag = self._check(text, address, width * count)
        self._count(address, threads, "read")
        self.shadow.note(text, self._index(real), width * count, threads, write=False)
        words = PROCESS[width]
        values = [words[(real - LOWEST) // width + i] for i in range(count)]
        if width == 8:
            values = [self._tag_loaded(v, "*" + self.labels[tag.max(initial=0)]) for v in values]
        return values

    def store(self, text, threads, address, width: int, values: list) -> None:
        real, _ = self._check(text, address, width * len(values))
        self._count(address, threads, "written")
        self.shadow.note(text, self._index(real), width * len(values), threads, write=True)
        write_words(text, PROCESS[width], (real - LOWEST) // width, values)

    @staticmethod
    def words(width: int) -> np.ndarray:
        return PROCESS[width]

    def atomic(self, text, threads, address, width: int) -> np.ndarray:
        """The addresses in PROCESS[width] of accesses that no other comes between."""
        real, _ = self._check(text, address, width)
        self._count(address, threads, "atomic")
        self.shadow.note(text, self._index(real), width, threads, write=True, atomic=True)
        return (real - LOWEST) // width
