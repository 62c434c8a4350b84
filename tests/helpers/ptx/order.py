"""What happens before what in one launch: barriers and atomics order warps, nothing else does.

Every warp counts its own synchronisations (its clock) and keeps, for each value of it, what it
knows of the others': vector clocks, as in FastTrack (Flanagan and Freund 2009).
"""

import numpy as np


class Order:
    def __init__(self, warps: int):
        self.clock = np.zeros(warps, np.int32)
        self.phase = np.zeros(warps, np.int32)  # as clock, but of barriers alone: they order lanes
        self.knowledge = [np.full(warps, -1, np.int32)]
        self.known = [[0] for _ in range(warps)]  # per warp and clock, a place in `knowledge`
        self.released: dict[int, np.ndarray] = {}

    def _now(self, warp: int) -> np.ndarray:
        return self.knowledge[self.known[warp][-1]]

    def _learn(self, warps, knowledge: np.ndarray) -> None:
        knowledge[warps] = self.clock[warps]
        self.clock = self.clock.copy()  # the log holds on to the old ones
        self.clock[warps] += 1
        for warp in warps:
            self.known[warp].append(len(self.knowledge))
        self.knowledge.append(knowledge)

    def barrier(self, warps) -> None:
        """What any of the warps did or knows, all of them know from here on."""
        self._learn(warps, np.max([self._now(w) for w in warps], axis=0))
        self.phase = self.phase.copy()
        self.phase[warps] += 1

    def atomic(self, warp: int, address: int, acquires: bool, releases: bool) -> None:
        """The warp takes over what others released at the address, and releases its own."""
        there = self.released.get(address)
        mine = self._now(warp)
        self._learn([warp], np.maximum(mine, there) if acquires and there is not None
                    else mine.copy())
        if releases:
            mine = self._now(warp)
            self.released[address] = mine if there is None else np.maximum(mine, there)

    def precedes(self, warp, clock, other, other_clock) -> np.ndarray:
        """Whether what `warp` did at `clock` is known to `other` at `other_clock`."""
        if not len(warp):
            return np.zeros(0, bool)
        begin = np.cumsum([0] + [len(k) for k in self.known])
        places = np.concatenate([np.array(k) for k in self.known])
        rows = places[begin[other] + other_clock]
        needed = np.flatnonzero(np.bincount(rows))
        table = np.stack([self.knowledge[n] for n in needed])
        return table[np.searchsorted(needed, rows), warp] >= clock
