"""What a thin module asks of the library it wraps, read from its source, and whether a table lists all of it.

The table is JSON: `classes`, by name, each with its attributes. The class "module" is the library itself. An attribute
says its `kind` (class, method, function, property, settable, member, overridden), a callable its `arguments`, `returns`
the class that comes out, and `seen` the versions that have it (all of the table's when it is left out). `python` lists
the other attribute accesses of the source, those of our own objects and Python's: nothing escapes the comparison.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULE = "module"
CALLABLE = ("class", "method", "function")

Table = dict[str, Any]


def load_table(path: Path) -> Table:
    """Read a table."""
    table: Table = json.loads(path.read_text("utf-8"))
    return table


def attributes(table: Table) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Class, attribute and what the table says, of everything."""
    for owner, members in table["classes"].items():
        for name, entry in members.items():
            yield owner, name, entry


@dataclass
class Uses:
    """What was found in a source.

    Attributes:
        used: class and attribute -> lines.
        wrong: one line for each use that the table does not have, or has otherwise.
        python: attribute accesses on what is not the library's.
    """

    used: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    python: set[str] = field(default_factory=set)


def uses(source: str, table: Table, module_names: tuple[str, ...]) -> Uses:
    """Follow a library's objects through a source.

    Args:
        source: of the thin module. What holds an object of the library got it from the library in the same function, or
            is annotated with the class's name.
        table: what the library has.
        module_names: expressions that are the library itself, "trt" and "self._trt".
    """
    tree = ast.parse(source)
    reader = _Reader(table, frozenset(module_names))
    reader.collect_attributes(tree)
    reader.visit(tree)
    return reader.found


class _Reader(ast.NodeVisitor):
    """Types of expressions: a class of the table, or None for what is Python's or ours."""

    def __init__(self, table: Table, module_names: frozenset[str]) -> None:
        self.classes: dict[str, dict[str, Any]] = table["classes"]
        self.module_names = module_names
        self.found = Uses()
        self.scopes: list[dict[str, str]] = [{}]
        self.held: dict[str, str] = {}  # attributes of our own objects that hold the library's

    def collect_attributes(self, tree: ast.AST) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
                kind = self._annotated(node.annotation)
                if kind:
                    self.held[node.target.attr] = kind

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        scope = dict(self.scopes[-1])
        for argument in (*node.args.args, *node.args.kwonlyargs):
            kind = self._annotated(argument.annotation) if argument.annotation else None
            scope.pop(argument.arg, None)
            if kind:
                scope[argument.arg] = kind
        self.scopes.append(scope)
        for statement in node.body:
            self.visit(statement)
        self.scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            kind = self._type(base)
            if kind:
                self._check_overrides(node, kind)
        for statement in node.body:
            self.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        kind = self._type(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self._name(target.id, kind)
            else:
                self._store(target, node.lineno)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._type(node.value)
        if isinstance(node.target, ast.Name):
            self._name(node.target.id, self._annotated(node.annotation))

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.expr):
            self._type(node)
        else:
            super().generic_visit(node)

    def _name(self, name: str, kind: str | None) -> None:
        if name in self.module_names:
            return
        if kind:
            self.scopes[-1][name] = kind
        else:
            self.scopes[-1].pop(name, None)

    def _annotated(self, annotation: ast.expr) -> str | None:
        name = annotation.id if isinstance(annotation, ast.Name) else None
        return name if name in self.classes and name != MODULE else None

    def _store(self, target: ast.expr, line: int) -> None:
        if isinstance(target, ast.Attribute):
            owner = self._type(target.value)
            if owner:
                self._use(owner, target.attr, line, ("settable",))
                return
        for child in ast.iter_child_nodes(target):
            if isinstance(child, ast.expr) and not isinstance(target, ast.Attribute):
                self._store(child, line)

    def _type(self, node: ast.expr) -> str | None:
        """The class of an expression; everything in it is looked at on the way, once."""
        if ast.unparse(node) in self.module_names:
            return MODULE
        if isinstance(node, ast.Name):
            return self.scopes[-1].get(node.id)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Attribute):
            owner = self._type(node.value)
            if owner:
                return self._use(owner, node.attr, node.lineno, ("class", "property", "settable", "member"))
            if node.attr in self.held:
                return self.held[node.attr]
            self.found.python.add(ast.unparse(node))
            return None
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)):
            for part in node.generators:
                for read in (part.iter, *part.ifs):
                    self._type(read)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._type(child)
        return None

    def _call(self, node: ast.Call) -> str | None:
        for argument in node.args:
            self._type(argument)
        for keyword in node.keywords:
            self._type(keyword.value)
        if not isinstance(node.func, ast.Attribute):
            self._type(node.func)
            return None
        owner = self._type(node.func.value)
        if owner is None:
            self.found.python.add(ast.unparse(node.func))
            return None
        name, line = node.func.attr, node.lineno
        returned = self._use(owner, name, line, CALLABLE)
        entry = self.classes.get(owner, {}).get(name)
        if entry and "arguments" in entry:
            self._check_arguments(node, f"{owner}.{name}", entry["arguments"])
        return returned

    def _check_arguments(self, node: ast.Call, name: str, known: list[str]) -> None:
        given = known[: len(node.args)] + [keyword.arg or "**" for keyword in node.keywords]
        if name.endswith(".__init__"):  # called on the class: self is said
            given = known[: len(node.args) - 1]
        strange = sorted(set(given) - set(known))
        if strange or len(node.args) > len(known) + name.endswith(".__init__"):
            what = f"line {node.lineno}: {name} takes {known}, is given {len(node.args)} and {strange}"
            self.found.wrong.append(what)

    def _use(self, owner: str, name: str, line: int, kinds: tuple[str, ...]) -> str | None:
        entry = self.classes.get(owner, {}).get(name)
        self.found.used.setdefault((owner, name), []).append(line)
        if entry is None:
            self.found.wrong.append(f"line {line}: the table has no {owner}.{name}")
            return None
        if entry["kind"] not in kinds:
            self.found.wrong.append(f"line {line}: {owner}.{name} is a {entry['kind']}, used as {kinds[0]}")
        if entry["kind"] == "class":
            return name
        returned: str | None = entry.get("returns")
        return returned if returned in self.classes else None

    def _check_overrides(self, node: ast.ClassDef, kind: str) -> None:
        for method in node.body:
            if not isinstance(method, ast.FunctionDef) or method.name == "__init__":
                continue
            entry = self.classes.get(kind, {}).get(method.name)
            self.found.used.setdefault((kind, method.name), []).append(method.lineno)
            names = [argument.arg for argument in method.args.args[1:]]
            if entry is None or entry["kind"] != "overridden" or entry["arguments"] != names:
                what = f"line {method.lineno}: {kind}.{method.name}({', '.join(names)}) is not what the table has"
                self.found.wrong.append(what)
