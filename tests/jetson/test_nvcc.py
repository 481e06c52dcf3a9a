"""nvcc compiles every kernel for sm_87, and none spills a register. Needs no GPU; skipped where nvcc is not here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import kernel_resources as report

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4copyPfi' for 'sm_87'
ptxas info    : Function properties for _Z4copyPfi
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 256 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 15.118 ms
ptxas info    : Compiling entry function '_Z4fillPf' for 'sm_87'
ptxas info    : Function properties for _Z4fillPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 360 bytes cmem[0]
"""


def compiler() -> str:
    nvcc = report.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc here")
    return nvcc


def test_the_report_is_read_and_spills_are_faults() -> None:
    rows = report.parse("a.cu", REPORT)
    assert [(row.registers, row.shared, row.spilled, row.stack) for row in rows] == [(24, 256, 32, 16), (8, 0, 0, 0)]
    assert len(report.faults(rows)) == 1
    assert "32 bytes spilled" in report.faults(rows)[0]
    assert "| 24 | 256 |" in report.markdown(rows, "nvcc")


def test_a_spilling_kernel_is_found(tmp_path: Path) -> None:
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) spill(float* y) {\n"
        "  float v[128];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 128; ++i) v[i] = y[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 128; ++i) y[i * 1024 + threadIdx.x] = v[i] * v[127 - i];\n"
        "}\n"
    )
    assert report.faults(report.compile_source(compiler(), source, "sm_87"))


@pytest.mark.slow
def test_no_kernel_spills() -> None:
    """For the Orin; `tools/kernel_resources.py` looks at all architectures."""
    rows = report.all_resources(compiler(), ["sm_87"])
    assert {row.source for row in rows} <= {source.name for source in report.kernel_sources()}
    assert len(rows) >= 30
    assert report.faults(rows) == []


@pytest.mark.parametrize("source", ["skip_rms_norm.cu", "argmax.cu"])
def test_nvcc_takes_the_sources_that_the_emulator_runs(source: str) -> None:
    """Quick: two of them for sm_87; the slow test takes all."""
    rows = report.compile_source(compiler(), report.PLUGINS / "src" / source, "sm_87")
    assert rows and report.faults(rows) == []
