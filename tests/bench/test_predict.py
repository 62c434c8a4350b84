"""The model of the kernels' time: what is read off machine code, and the arithmetic."""

from itertools import product

import pytest

from bench.__main__ import main
from bench.speed import gpu_session, predict

LISTING = """
        /*0000*/                   LDG.E R2, desc[UR4][R8.64] ;
        /*0010*/                   IMAD.WIDE R4, R2, 0x8, R10 ;
        /*0020*/                   LDG.E.64 R6, desc[UR4][R4.64] ;
        /*0030*/                   ISETP.NE.AND P0, PT, R6, RZ, PT ;
        /*0040*/              @!P0 BRA 0x00c0 ;
        /*0050*/                   LDG.E.128 R12, desc[UR4][R6.64] ;
        /*0060*/                   LDG.E.128 R16, desc[UR4][R6.64+0x800] ;
        /*0070*/                   FADD R20, R12, R16 ;
        /*0080*/                   LDG.E.128 R24, desc[UR4][R6.64+0x1000] ;
        /*0090*/                   FADD R21, R24, R20 ;
        /*00a0*/               @P1 BRA 0x0050 ;
        /*00b0*/               @P2 BRA 0x0000 ;
        /*00c0*/                   EXIT ;
"""
SMALL = predict.Gpu("a slide rule", "sm_90", 10, 1e12, 1e-6, 5e-7, 1e9, copy=1.0)
CODE = predict.Code(programs=40, threads=128, block=1024, registers=64, shared=0, loaded=32,
                    in_flight=32, instructions=100, chain=3, slot_chain=2)


def test_loops_chains_and_bytes_are_read_off_the_machine_code():
    code = predict.disassemble(LISTING)
    assert [i.opcode for i in code][:2] == ["LDG.E", "IMAD.WIDE"] and len(code) == 13
    assert predict.loops(code) == [(5, 10), (0, 11)]
    assert predict.fast_loop(code) == (5, 10)
    assert predict.before_waiting(code[5:10]) == 32
    assert predict.wide_bytes(code[5:10]) == 48
    assert predict.first_wide_depth(code, 0, 6) == 2


def test_where_enough_is_on_its_way_the_floor_is_all_but_reached():
    found = predict.predicted(CODE, SMALL, 10**9, 8)
    assert found["floor"] == pytest.approx(8e-3) and found["waves"] == 1
    assert found["seconds"] == pytest.approx(
        predict.LAUNCH + 3 * 5e-7 + max(8e-3, 10**9 / 1024 / 40 * 1.2e-6 + 62 / 40 * 2 * 5e-7),
        rel=1e-3)


def test_more_programs_than_fit_take_another_wave():
    full = CODE._replace(registers=255, programs=40)
    assert predict.resident(full, SMALL) == 2
    assert predict.predicted(full, SMALL, 10**8, 8)["waves"] == 2


def test_what_is_predicted_are_variants_that_there_are():
    pytest.importorskip("triton", reason="the kernels need Triton")
    from ..backends.aot_compile import CONSTANTS

    for what in product(predict.METHODS, predict.BASES, predict.DTYPES):
        for kernel, constants, _ in predict.launches(*what):
            assert constants in CONSTANTS[kernel], what


def test_an_unknown_gpu_and_rows_without_prediction_are_refused(tmp_path, capsys):
    assert main(["gpu", "--predict", "--gpu", "abacus"]) == 2
    assert "unknown GPU 'abacus'" in capsys.readouterr().err
    assert main(["gpu", "--rows", str(tmp_path / "rows")]) == 2
    assert "--predict" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["--predict", "--minutes", "3"], "--minutes has no effect with --predict"),
    (["--predict", "--list"], "--list has no"), (["--predict", "--out", "x"], "--out has no"),
    (["--predict", "--only", "memcheck"], "--only has no"), (["--gpu", "A100"], "--predict"),
])  # fmt: skip
def test_options_without_effect_are_refused(words, said, capsys, monkeypatch):
    monkeypatch.setattr(predict, "predict", lambda *given: 0)
    monkeypatch.setattr(gpu_session, "gpu", lambda *given: 0)
    assert main(["gpu", *words]) == 2 and said in capsys.readouterr().err


def test_what_was_measured_stands_beside_the_prediction(monkeypatch):
    monkeypatch.setattr(predict, "compiled_code", lambda *_: CODE)
    row = dict(implementation="fastsam triton", method="sam", base="sgd", dtype="fp32", graph=True,
               parameters=10**8, ms={"p50": 1.0}, of_copy=0.91)
    text = predict.beside_measured([row, row | dict(graph=False), row | dict(parameters=7)],
                                   "NVIDIA H200")
    assert text.count("\n") == 2 and "1000 us, 91%" in text
    assert predict.beside_measured([row], "an abacus") == ""
