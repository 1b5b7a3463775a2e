"""Tensor cores and asynchronous copies of the emulator, against a plain matrix product."""

import pytest

from tests.cuda_emulation.build import HERE, build, needs_compiler, run


@needs_compiler
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_fragments_by_hand_and_by_ldmatrix_give_the_product(tmp_path, sanitizer):
    done = run([build(tmp_path, "tensor_core", [HERE / "tensor_core.cpp"], sanitizer=sanitizer)])
    assert done.returncode == 0, done.stdout + done.stderr
