"""From a budget to the best model within it: which steps, how much each may cost, one call for all."""

from qpalette.recipe.forecast import Step, forecast
from qpalette.recipe.options import BEST, STANDARD, Recipe, recipe_of
from qpalette.recipe.run import Compressed, Wish, compress

__all__ = ["BEST", "STANDARD", "Compressed", "Recipe", "Step", "Wish", "compress", "forecast", "recipe_of"]
