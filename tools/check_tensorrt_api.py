"""Compare the tables of what orin-kit uses of TensorRT and pycuda with the packages themselves.

    python tools/check_tensorrt_api.py BINDINGS... [--pycuda SOURCE]

BINDINGS are unpacked wheels (`pip download --no-deps tensorrt-cu12-bindings==10.3.0`, then unzip) for this Python.
They are imported: pybind11 then says the signature of every method. The libraries they link to, libnvinfer and its
like, are not in the wheels and not on PyPI, and only nine of their functions are called, none of them at import; so
empty libraries of the same names, compiled here by `cc`, stand in for them. Nothing of TensorRT runs.
SOURCE is pycuda's unpacked source package, whose documentation is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from api_uses import CALLABLE, MODULE, Table, attributes, load_table

TOOLS = Path(__file__).parent
TENSORRT_TABLE, PYCUDA_TABLE = TOOLS / "tensorrt_api.json", TOOLS / "pycuda_api.json"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
MISSING_SYMBOL = re.compile(r"undefined symbol: (\w+)")
MOST_SYMBOLS = 40
DIRECTIVE = re.compile(r"^( *)\.\. (class|function|(?:static)?method|attribute|exception):: ([\w.]+)(?:\((.*)\))?")
# Run in a process of its own, which has the stand-ins on its library path: classes -> attributes -> what they are.
DUMP = """
import json, sys
import tensorrt_bindings as trt

def say(owner, value):
    if isinstance(value, property):
        return {"kind": "settable" if value.fset else "property", "doc": getattr(value.fget, "__doc__", "") or ""}
    if isinstance(value, type):
        return {"kind": "class", "doc": getattr(value.__init__, "__doc__", "") or ""}
    if callable(value):
        return {"kind": "callable", "doc": value.__doc__ or ""}
    return {"kind": "member", "doc": type(value).__name__}

wanted = json.load(sys.stdin)
found = {}
for owner, names in wanted.items():
    target = trt if owner == "module" else getattr(trt, owner, None)
    found[owner] = None if target is None else {n: say(target, getattr(target, n)) for n in names if hasattr(target, n)}
print(json.dumps({"version": trt.__version__, "found": found}))
"""


def read_bindings(folder: Path, table: Table) -> tuple[str, dict[str, Any]]:
    """The version of a bindings package, and for each class of the table its attributes with their docstrings.

    Raises:
        RuntimeError: it cannot be imported (another Python, no C compiler, a symbol that is not a function's).
    """
    module = next(iter(sorted(folder.rglob("tensorrt_bindings/tensorrt*.so"))), None)
    if module is None:
        raise RuntimeError(f"{folder} has no tensorrt_bindings/tensorrt.so: unpack a bindings wheel there")
    needed = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    sonames = [name for name in re.findall(r"\[(lib\w+\.so\.\d+)\]", needed) if name[3:].split(".")[0] in LIBRARIES]
    wanted = {owner: list(members) for owner, members in table["classes"].items()}
    symbols: set[str] = set()
    with tempfile.TemporaryDirectory() as stand_ins:
        for _ in range(MOST_SYMBOLS):
            _compile(Path(stand_ins), sonames, symbols)
            done = _import(module.parents[1], Path(stand_ins), wanted)
            missing = MISSING_SYMBOL.search(done.stderr)
            if done.returncode == 0 or missing is None:
                break
            symbols.add(missing[1])
    if done.returncode:
        raise RuntimeError(f"{module} cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    return said["version"], said["found"]


def _compile(folder: Path, sonames: list[str], symbols: set[str]) -> None:
    source = folder / "stand_in.c"
    source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(symbols)))
    for soname in sonames:
        command = ["cc", "-shared", "-fPIC", str(source), f"-Wl,-soname,{soname}", "-o", str(folder / soname)]
        subprocess.run(command, check=True, capture_output=True)


def _import(package: Path, stand_ins: Path, wanted: dict[str, list[str]]) -> subprocess.CompletedProcess[str]:
    # LD_BIND_NOW: name all that is missing at import, not at a call.
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stand_ins), "PYTHONPATH": str(package), "LD_BIND_NOW": "1"}
    command = [sys.executable, "-c", DUMP]
    return subprocess.run(
        command, input=json.dumps(wanted), env=environment, capture_output=True, text=True, check=False
    )


def compare(table: Table, version: str, found: Mapping[str, Any]) -> tuple[list[str], int]:
    """What the table says otherwise than a version, a line each, and how many entries were compared."""
    wrong: list[str] = []
    compared = 0
    for owner, name, entry in attributes(table):
        there = (found.get(owner) or {}).get(name)
        listed = any(version.startswith(seen) for seen in entry.get("seen", table["versions"]))
        compared += 1
        place = f"{owner}.{name}"
        if listed and there is None:
            wrong.append(f"{place} is not in {version}")
        elif not listed and there is not None:
            wrong.append(f"{place} is in {version}, the table says it is not")
        elif there is not None:
            wrong += [f"{place} in {version}: {what}" for what in _differences(name, entry, there)]
    return wrong, compared


def _differences(name: str, entry: Mapping[str, Any], there: Mapping[str, str]) -> list[str]:
    kind, doc = entry["kind"], there["doc"]
    expected = {"method": "callable", "function": "callable", "overridden": "callable"}.get(kind, kind)
    if kind == "member" and there["kind"] == "class":  # pybind11's enum members are of their own class
        expected = "class"
    if expected != there["kind"] and not (kind == "property" and there["kind"] == "settable"):
        return [f"it is a {there['kind']}, the table says {kind}"]
    if kind == "member" and entry.get("returns") not in (None, doc):
        return [f"it is a {doc}, not {entry['returns']}"]
    if kind not in (*CALLABLE, "overridden", "property", "settable"):
        return []
    signatures = parse_signatures("__init__" if kind == "class" else name, doc)
    if "arguments" in entry:
        known = [arguments for arguments, _returned in signatures]
        if entry["arguments"] not in known:
            return [f"it takes {' or '.join(map(str, known)) or 'what it does not say'}, not {entry['arguments']}"]
    wanted = entry.get("returns")
    returned = {last for _arguments, last in signatures if last}
    if wanted and returned and not any(last in (wanted, f"I{wanted}", "object", "str_attr") for last in returned):
        return [f"it returns {', '.join(sorted(returned))}, not {wanted}"]
    return []


def parse_signatures(name: str, doc: str) -> list[tuple[list[str], str]]:
    """Arguments without self, and the last part of the returned type, of every signature in pybind11's docstring."""
    found = []
    pattern = rf"(?:^|\d\. ){re.escape(name)}\((.*?)\)(?: -> ([^\n]+))?$"
    for match in re.finditer(pattern, doc, re.MULTILINE):
        if match[1] == "*args, **kwargs":  # the heading of overloads
            continue
        arguments = [part.partition(":")[0].strip() for part in _split(match[1])]
        arguments = [one for one in arguments if one and one not in ("self", "/")]
        found.append((arguments, re.split(r"::|\.", (match[2] or "").rstrip(">"))[-1]))
    if not found:  # a property's getter: "(arg0: X) -> Y"
        getter = re.match(r"\((?:self|arg0): [^)]*\) -> ([^\n]+)", doc)
        if getter:
            found.append(([], re.split(r"::|\.", getter[1])[-1]))
    return found


def _split(text: str) -> list[str]:
    """At commas that no bracket holds."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def read_pycuda(source: Path) -> dict[str, dict[str, list[str] | None]]:
    """What pycuda's documentation declares: class ("module" for functions) -> name -> arguments or None."""
    text = (source / "doc" / "driver.rst").read_text("utf-8")
    found: dict[str, dict[str, list[str] | None]] = {MODULE: {}}
    owner = MODULE
    for line in text.splitlines():
        match = DIRECTIVE.match(line)
        if match is None:
            continue
        indent, kind, name, arguments = match.groups()
        owner = MODULE if not indent else owner
        names = None if arguments is None else [part.partition("=")[0].strip() for part in arguments.split(",") if part]
        found[owner][name] = names
        if kind == "class":
            owner = name
            found.setdefault(owner, {})
    return found


def compare_pycuda(table: Table, found: Mapping[str, Mapping[str, list[str] | None]]) -> list[str]:
    """What the table says otherwise than pycuda's documentation."""
    wrong = []
    for owner, name, entry in attributes(table):
        if entry.get("undocumented"):
            continue
        if name not in found.get(owner, {}):
            wrong.append(f"pycuda's documentation has no {owner}.{name}")
        elif entry["kind"] in CALLABLE and entry.get("arguments") is not None:
            documented = found[owner][name] or []
            if entry["arguments"] != documented:
                wrong.append(f"{owner}.{name} takes {documented}, the table says {entry['arguments']}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the API tables with the packages.")
    parser.add_argument("bindings", nargs="*", type=Path, help="folders of unpacked bindings wheels")
    parser.add_argument("--pycuda", type=Path, help="pycuda's unpacked source package")
    arguments = parser.parse_args()
    table = load_table(TENSORRT_TABLE)
    failed = False
    for folder in arguments.bindings:
        version, found = read_bindings(folder, table)
        wrong, compared = compare(table, version, found)
        print(f"TensorRT {version}: {compared} entries compared, {len(wrong)} differ")
        print("".join(f"  {line}\n" for line in wrong), end="")
        failed = failed or bool(wrong)
    if arguments.pycuda:
        pycuda = load_table(PYCUDA_TABLE)
        wrong = compare_pycuda(pycuda, read_pycuda(arguments.pycuda))
        print(f"pycuda: {len(list(attributes(pycuda)))} entries compared, {len(wrong)} differ")
        print("".join(f"  {line}\n" for line in wrong), end="")
        failed = failed or bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
