"""What each CUDA kernel takes of a multiprocessor, as ptxas reports it: registers, static shared memory, spills.

    python tools/kernel_resources.py --markdown docs/measurements/kernel-resources.md

Needs nvcc (on the path or in CUDACXX) and no GPU. Exit code 1 where a kernel spills registers or keeps a stack.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PLUGINS = Path(__file__).parents[1] / "jetson" / "plugins"
ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90")
REPORTED = "sm_87"
FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v")

_ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<architecture>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class CompileError(RuntimeError):
    """nvcc said no; holds its words."""


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture. Shared memory in bytes, the static part: dynamic is asked for at the launch."""

    source: str
    kernel: str
    architecture: str
    registers: int
    shared: int
    spilled: int
    stack: int


def find_nvcc() -> str | None:
    """CUDACXX, the path, or CUDA's usual place."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def kernel_sources() -> list[Path]:
    return sorted((PLUGINS / "src").glob("*.cu"))


def compile_source(nvcc: str, source: Path, architecture: str) -> list[Resources]:
    """Compile one file for one architecture, keep nothing of it but the report. Raises CompileError."""
    with tempfile.TemporaryDirectory() as folder:
        includes = [f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'src'}"]
        output = ["-cubin", "-o", str(Path(folder) / "out.cubin")]
        command = [nvcc, *FLAGS, f"-arch={architecture}", *includes, *output, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")
    return parse(source.name, done.stdout + done.stderr)


def parse(source: str, report: str) -> list[Resources]:
    """ptxas's own words as Resources."""
    found = list(_ENTRY.finditer(report))
    names = demangled([match["symbol"] for match in found])
    rows = []
    for match, name in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        rows.append(
            Resources(
                source=source,
                kernel=name,
                architecture=match["architecture"],
                registers=int(match["registers"]),
                shared=int(shared[1]) if shared else 0,
                spilled=int(match["stores"]) + int(match["loads"]),
                stack=int(match["stack"]),
            )
        )
    return rows


def demangled(symbols: Sequence[str]) -> list[str]:
    """`gemv_kernel<4, 1>` of each symbol; the symbol itself where binutils' c++filt is not here."""
    tool = shutil.which("c++filt")
    if tool is None or not symbols:
        return list(symbols)
    done = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [_short(line) for line in done.stdout.splitlines()]


def _short(signature: str) -> str:
    """The name and its template arguments, without result, namespaces, casts and parameters."""
    plain = re.sub(r"\((?:int|bool)\)", "", signature.replace("(anonymous namespace)::", ""))
    plain = re.sub(r"\(.*", "", plain).removeprefix("void ")
    return re.sub(r"\w+::", "", plain)


def all_resources(nvcc: str, architectures: Iterable[str], jobs: int = 2) -> list[Resources]:
    """Every kernel on every architecture."""
    work = [(source, architecture) for architecture in architectures for source in kernel_sources()]
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(lambda one: compile_source(nvcc, *one), work)
        return [row for part in parts for row in part]


def faults(rows: Iterable[Resources]) -> list[str]:
    """A line for each kernel that spills or keeps a stack."""
    return [
        f"{row.source}: {row.kernel} on {row.architecture}: {row.spilled} bytes spilled, {row.stack} bytes of stack"
        for row in rows
        if row.spilled or row.stack
    ]


def markdown(rows: Sequence[Resources], version: str) -> str:
    """The page: a line for each kernel, registers on each architecture."""
    architectures = sorted({row.architecture for row in rows})
    cells = {(row.source, row.kernel, row.architecture): row for row in rows}
    kernels = sorted({(row.source, row.kernel) for row in rows})
    bad = faults(rows)
    lines = [
        "# What the kernels take of a multiprocessor",
        "",
        "    python tools/kernel_resources.py --markdown docs/measurements/kernel-resources.md",
        "",
        f"{version}. Registers a thread, as ptxas reports them; static shared memory in bytes on {REPORTED}: a block's",
        "dynamic shared memory is asked for at the launch and not in it. sm_87 has 65,536 registers a multiprocessor.",
        "",
        *(
            bad
            if bad
            else [f"{len(kernels)} kernels on {len(architectures)} architectures: no register is spilled, no stack."]
        ),
        "",
        "This is a compiler's report. The kernels have not been run on an Orin, see jetson/README.md.",
        "",
        "| source | kernel | " + " | ".join(architectures) + " | shared |",
        "|---|---|" + "---:|" * (len(architectures) + 1),
    ]
    for source, kernel in kernels:
        of_each = [cells.get((source, kernel, architecture)) for architecture in architectures]
        counts = [str(row.registers) if row else "" for row in of_each]
        reported = cells.get((source, kernel, REPORTED)) or next(row for row in of_each if row)
        lines.append(f"| {source} | `{kernel}` | {' | '.join(counts)} | {reported.shared} |")
    return "\n".join(lines) + "\n"


def nvcc_version(nvcc: str) -> str:
    """`nvcc 13.0, V13.0.88`."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"release ([\d.]+), (V[\d.]+)", done.stdout)
    return f"nvcc {match[1]}, {match[2]}" if match else "nvcc of an unknown version"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES), help="comma-separated, sm_87 and others")
    parser.add_argument("--markdown", type=Path, help="write the page here instead of to the terminal")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("kernel_resources: no nvcc on the path: install CUDA, or name nvcc in CUDACXX", file=sys.stderr)
        return 2
    try:
        rows = all_resources(nvcc, options.architectures.split(","), options.jobs)
    except CompileError as error:
        print(error, file=sys.stderr)
        return 2
    page = markdown(rows, nvcc_version(nvcc))
    if options.markdown:
        options.markdown.write_text(page, "utf-8")
    else:
        print(page, end="")
    bad = faults(rows)
    print("\n".join(bad), file=sys.stderr, end="\n" if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
