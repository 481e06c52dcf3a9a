"""Distillation: a recipe, three stages, one train loop."""

from orin_kit.distill.comparison import compare
from orin_kit.distill.recipe import Recipe
from orin_kit.distill.run import distill

__all__ = ["Recipe", "compare", "distill"]
