"""Recipes on the command line: their flags, the folder of a run, and its report."""

from lit_scale.cli.flags import RecipeCLI
from lit_scale.cli.recipe import Recipe, run_recipe

__all__ = ["Recipe", "RecipeCLI", "run_recipe"]
