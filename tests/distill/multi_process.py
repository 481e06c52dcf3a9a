"""A distillation as `accelerate launch` starts it: recipe and output directory are the arguments."""

from __future__ import annotations

import sys

from orin_kit.distill import Recipe, distill

if __name__ == "__main__":
    distill(Recipe.load(sys.argv[1]), sys.argv[2], progress=False)
