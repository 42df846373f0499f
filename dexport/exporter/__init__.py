"""From a checkpoint to a bundle: recipes, weights, trace, passes, precision, engine."""
