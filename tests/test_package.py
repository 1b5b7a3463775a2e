"""The package as a whole: what importing it loads, what the build contains, threads, and life without the extension."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import fastgan
from fastgan import _impl

needs_extension = pytest.mark.skipif(_impl.extension_error is not None, reason="no compiled extension in this build")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a fresh process away from the repository."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=sysconfig.get_path("stdlib"),
        timeout=240,
    )


def test_R68_import_brings_in_torch_alone_and_says_nothing():
    code = """
import sys, json, torch
before = set(sys.modules)
import fastgan
heavy = {"transformers", "matplotlib", "PIL", "sklearn", "scipy", "typer", "rich", "datasets", "safetensors"}
print(json.dumps(sorted(heavy & (set(sys.modules) - before))))
"""
    done = run(code, PATH="")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    assert done.stderr == ""


def test_import_adds_less_than_half_a_second_to_torch():
    code = """
import time, torch
begin = time.perf_counter(); import fastgan; print(time.perf_counter() - begin)
"""
    assert min(float(run(code).stdout) for _ in range(3)) < 0.5


def test_R73_info_names_versions_capability_and_the_path_of_each_operator():
    info = fastgan.info()
    assert info["torch"] == torch.__version__
    assert set(info["operators"].values()) <= {"kernel", "reference", "reference (selected)"}
    assert "attention" in info["operators"]
    assert "capability" in str(info)


def test_R71_without_the_extension_one_warning_and_the_reference_runs(tmp_path):
    # A copy of the Python files alone, as on a machine where the build failed.
    shutil.copytree(Path(fastgan.__file__).parent, tmp_path / "fastgan", ignore=shutil.ignore_patterns("*.so", "_csrc"))
    code = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
sys.path.insert(0, {str(tmp_path)!r})
import torch, fastgan
from fastgan.nn import functional as F
q = torch.randn(1, 2, 5, 4, requires_grad=True)
expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
out = F.scaled_dot_product_attention(q, q, q)
torch.testing.assert_close(out, expected)
out.sum().backward()
print(fastgan.info()["extension"][:7], fastgan.info()["operators"]["attention"])
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["missing", "reference"]
    assert done.stderr.count("Warning") == 1
    assert "fastgan info" in done.stderr


def test_unknown_implementation_is_refused_by_name():
    with pytest.raises(ValueError, match=r"implementation.*'fast'"), fastgan.use("fast"):
        pass
    done = run("import fastgan", FASTGAN_IMPL="quick")
    assert done.returncode == 1
    assert "FASTGAN_IMPL" in done.stderr


@needs_extension
def test_capability_is_forced_by_the_environment_and_an_unknown_one_is_said():
    done = run("import fastgan; print(fastgan.info()['capability'])", FASTGAN_CPU_CAPABILITY="nonesuch")
    assert "nonesuch" in done.stderr
    from fastgan import _C

    for name in _C.available_capabilities():
        done = run("import fastgan; print(fastgan.info()['capability'])", FASTGAN_CPU_CAPABILITY=name)
        assert done.stdout.strip() == name
        assert done.stderr == ""


@needs_extension
@pytest.mark.skipif(os.cpu_count() == 1, reason="one processor")
def test_two_threads_are_used_and_set_num_threads_is_obeyed():
    from fastgan import _C

    torch.set_num_threads(2)
    assert _C.threads_used(16) == 2
    torch.set_num_threads(1)
    assert _C.threads_used(16) == 1


def _extension() -> Path:
    from fastgan import _C

    return Path(_C.__file__)


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
def test_the_extension_needs_the_stable_abi_alone_and_has_no_run_path():
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", _extension()], capture_output=True, text=True
    ).stdout
    assert "aoti_torch" in undefined
    assert not re.search(r"\b(at|c10|torch)::", undefined)
    dynamic = subprocess.run(["readelf", "-d", _extension()], capture_output=True, text=True).stdout
    assert not re.search(r"RUNPATH|RPATH", dynamic)
    assert not re.search(r"NEEDED.*(gomp|omp|torch_python|c10)", dynamic)


@needs_extension
def test_the_extension_names_no_folder_of_the_machine_that_built_it():
    content = _extension().read_bytes()
    repository = str(Path(__file__).resolve().parent.parent).encode()
    assert repository + b"/csrc" not in content
    assert str(Path(torch.__file__).parent).encode() not in content


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
def test_kernel_objects_share_no_symbol_between_instruction_sets():
    repository = Path(__file__).resolve().parent.parent
    compiled = "build/*/CMakeFiles/*.dir/csrc/*/*_{}.cpp.o"
    objects = [each for kind in ("cpu", "amx") for each in repository.glob(compiled.format(kind))]
    if not objects:
        pytest.skip("built elsewhere: no object files beside the sources")
    for each in objects:
        symbols = subprocess.run(["nm", "-C", each], capture_output=True, text=True).stdout.splitlines()
        weak = [s for s in symbols if re.search(r"^[0-9a-f]+ [WVu] ", s)]
        assert not weak, f"{each.name}: {weak[:5]}"
        assert not [s for s in symbols if "_GLOBAL__sub_I" in s], each.name
        isa = re.search(r"_(baseline|avx2|avx512|amx|neon)\.dir", str(each)).group(1)
        exported = [s.split()[-1] for s in symbols if re.search(r"^[0-9a-f]+ T ", s)]
        assert exported, each.name
        assert all(name.endswith(f"_{isa}") for name in exported), (each.name, exported)
