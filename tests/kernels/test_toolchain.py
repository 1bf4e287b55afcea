"""No kernel here is of the kind that some compilers break."""

import pytest

from warploom.kernels import toolchain


def test_a_first_factor_in_registers_is_seen():
    from tests.kernels.launches import products_from_registers

    shared = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1,%f2}, %rd1, %rd2, 1, 1;"
    registers = shared.replace("%rd1", "{%r1,%r2,%r3,%r4}")
    assert not products_from_registers(shared)
    assert products_from_registers(f"{shared}\n{registers}") == 1


@pytest.mark.parametrize(("installed", "able"), [("3.6.0", False), ("3.7.1", True), ("4.0", True)])
def test_an_old_triton_does_not_run_ahead_of_a_head_in_two_tiles(monkeypatch, installed, able):
    monkeypatch.setattr(toolchain.importlib.metadata, "version", lambda name: installed)
    assert toolchain.pipelines_two_tiles() == able
