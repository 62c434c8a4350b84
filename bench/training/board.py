"""TensorBoard's files beside a run's metrics.jsonl."""

from pathlib import Path
from typing import Any


def open_board(folder: Path, epoch: int):
    """Return a SummaryWriter that goes on at `epoch`; what was written past it no longer counts."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=epoch)


def write_row(board, row: dict[str, Any]) -> None:
    """Write a finished epoch's numbers, on the disk when this returns."""
    for name, value in row.items():
        if name != "epoch" and not isinstance(value, bool):
            board.add_scalar(name, value, row["epoch"])
    board.flush()
