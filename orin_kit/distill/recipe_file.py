"""A recipe's YAML file: read, overridden, checked; every mistake is named with its field and its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orin_kit.distill.recipe import Recipe
from orin_kit.errors import UserError

# Resolved against the recipe's own directory.
PATHS = (
    ("teacher",),
    ("teacher_logits",),
    ("student",),
    ("continue_from",),
    ("data", "chats"),
    ("data", "questions", "chats"),
    ("data", "general", "chats"),
    ("data", "back_translation", "there"),
    ("data", "back_translation", "back"),
)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key.path=value` overrides.

    Paths inside the file are relative to it, paths in overrides to the working directory.

    Raises:
        UserError: the file is missing, is not YAML, or a field is unknown, missing or has a wrong value (its line is
            named where the file has one for it).
    """
    path = Path(path)
    fields, lines = _read_yaml(path)
    for keys in PATHS:
        _resolve(fields, keys, path.absolute().parent)
    for override in overrides:
        changed = _apply(fields, override)
        lines = {field: line for field, line in lines.items() if field[: len(changed)] != changed}
    for keys in PATHS:
        _resolve(fields, keys, Path.cwd())
    return parse(fields, str(path), lines)


def parse(
    fields: Mapping[str, Any], source: str = "recipe", lines: Mapping[tuple[str, ...], int] | None = None
) -> Recipe:
    """Validate a recipe's fields.

    Args:
        fields: as YAML has them.
        source: what a message calls the recipe.
        lines: the line of each field, by its path.

    Raises:
        UserError: names every field that is wrong, with its line.
    """
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        faults = [_fault(dict(fault), lines or {}) for fault in error.errors()]
        raise UserError(f"{source}: {'; '.join(faults)}", mend="mend the recipe or the --set option") from error


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe for another place: relative paths are what they are from here."""
    fields = recipe.model_dump()
    for keys in PATHS:
        *parents, last = keys
        place: Any = fields
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(place.get(last), Path):
            place[last] = place[last].absolute()
    return Recipe.model_validate(fields)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """A recipe's fields, and the line of each."""
    if not path.is_file():
        raise UserError(f"no such recipe: {path}", mend="give the path of a .yaml recipe, as in calibration/recipes/")
    try:
        text = path.read_text("utf-8")
        fields, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = f"{path} is not YAML: {' '.join(str(error).split())}"
        raise UserError(what, mend="mend that line") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a recipe (a mapping of fields)", mend="see calibration/recipes/demo.yaml")
    return fields, _lines(tree)


def _lines(node: yaml.Node | None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """The line, from 1, of every field and list item below a YAML node."""
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(index), item, item) for index, item in enumerate(node.value)]
    else:
        return found
    for name, place, value in children:
        here = (*path, name)
        found[here] = place.start_mark.line + 1
        found |= _lines(value, here)
    return found


def _apply(fields: dict[str, Any], override: str) -> tuple[str, ...]:
    """Set one `a.b.c=value`, the value being YAML; returns the field's path."""
    key, equals, value = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise UserError(f"override {override!r} is not key=value", mend="as in stages.features.steps=20")
    *parents, last = key.strip().split(".")
    place = fields
    for parent in parents:
        if not isinstance(place.get(parent), dict):
            place[parent] = {}
        place = place[parent]
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r} has a value that is not YAML", mend="quote it") from error
    return (*parents, last)


def _resolve(fields: dict[str, Any], keys: tuple[str, ...], base: Path) -> None:
    *parents, last = keys
    place: Any = fields
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    if isinstance(place, dict) and isinstance(place.get(last), str):
        # Not resolve(): links stay as the user wrote them.
        place[last] = str(Path(base / Path(place[last]).expanduser()))


def _fault(fault: dict[str, Any], lines: Mapping[tuple[str, ...], int]) -> str:
    path = tuple(str(part) for part in fault["loc"])
    # The field itself, or what it is missing from; pydantic's path may end in the name of a type.
    line = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), None)
    where = ".".join(path) or "recipe"
    at = f"line {line}, " if line is not None else ""
    what = "unknown field" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
    given = fault.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float) and fault["type"] != "missing" else ""
    return f"{at}{where}: {what}{shown}"
