"""Continual distillation: a student learns a new domain, and what it learned before is rehearsed and watched."""

from __future__ import annotations

from orin_kit.distill.recipe import General, Recipe
from orin_kit.distill.recipe_file import read
from orin_kit.errors import UserError


def continued(recipe: Recipe) -> Recipe:
    """The recipe with its general set filled in: what `continue_from` was trained on, unless the recipe names one.

    That is its recipe's own data: neither what that run itself rehearsed nor what a teacher answered for it. For a
    longer memory bring one file of chats of all earlier domains as data.general.

    Raises:
        UserError: the earlier result does not say what it was trained on.
    """
    home = recipe.continue_from
    if home is None or recipe.data.general is not None:
        return recipe
    told = home / "recipe.yaml"
    if not told.is_file():
        what = f"continue_from: {home} has no recipe.yaml, so it is not known what it was trained on"
        raise UserError(what, mend="name chats or tasks in data.general")
    before = read(told)
    tasks = before.data.tasks
    if tasks is not None and tasks.seed is None:
        tasks = tasks.model_copy(update={"seed": before.seed})
    general = General(tasks=tasks, chats=before.data.chats, held_out=before.data.held_out)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"general": general})})
