"""What only the Triton kernels have: programs, tickets, tables. `test_contract.py` has the rest."""

import importlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from fastsam import choose, space  # noqa: E402
from fastsam.hyper import COLUMN, COLUMNS  # noqa: E402
from fastsam.kernels import triton as kernels  # noqa: E402

from ..helpers.pairs import BF16, BLOCK, FP32, SIZES, run  # noqa: E402
from ..helpers.variants import GROUPS, deal  # noqa: E402

# by import_module: as attributes of the package, these names are the launchers
common, launch = (importlib.import_module(f"fastsam.kernels.triton.{name}")
                  for name in ("common", "launch"))


def test_the_contract_s_sizes_are_about_a_block():
    assert BLOCK == common.BLOCK


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", ["fasam", "sam", "fsam-cosine"])
def test_programs_that_walk_several_blocks(name, dtype, device, monkeypatch):
    """With two programs only, every program loops; the tickets and sums must still come out."""
    monkeypatch.setattr(launch, "PROGRAMS", 2)
    pair = run(kernels, SIZES, deal(len(SIZES), GROUPS), name, dtype, device, steps=2)
    assert pair.ours.spaces[0].partials[0, :2].all()
    assert not pair.ours.spaces[0].partials[:, 2:].any()
    assert pair.ours.spaces[0].counters.tolist() == [0, 0, 0]


def test_more_than_128_parameters_count_their_steps(device):
    """The last program updates the counters 128 slots at a time."""
    pair = run(kernels, [1] * 131, deal(131, GROUPS), "fsam-official", FP32, device, steps=2)
    (own,) = pair.ours.spaces
    assert (own.steps[0] == 2).all()
    for slot in own.slots:
        assert int(slot.v_steps) == (2 if GROUPS[slot.group]["momentum"] else 0)


# ---- the tables and the interface


@pytest.mark.skipif(not common.INTERPRETED, reason="compiled, they read a GPU's memory")
def test_the_interpreter_gets_no_addresses_of_a_gpus_memory():
    """It would read them on the host, which ends the process."""
    kind = SimpleNamespace(device=torch.device("cuda", 0), dtype=FP32)
    own = SimpleNamespace(kind=kind, numel=10**6, dense=True)
    backend, why = choose.choice([own])
    assert backend == "reference" and "TRITON_INTERPRET=1" in why
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 .*: unset it"):
        choose.choose("triton", [own])


def test_the_kernels_columns_and_cells_are_the_tables_own():
    unused = {"dampening", "given_sigma"}  # 1 - dampening, and sigma as it is, are enough
    for name, i in COLUMN.items():
        assert name in unused or getattr(common, name.upper()).value == i, name
    assert common.HYPER.value == len(COLUMNS)
    for names in (space.CONTROL, space.COUNTERS):
        assert [getattr(common, name.upper()).value for name in names] == list(range(len(names)))


def test_a_block_starts_at_16_bytes_of_the_flat_buffers():
    assert BLOCK % space.PAD == 0
