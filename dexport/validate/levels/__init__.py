"""The levels of a validation: custom ops, one evaluation, a whole trajectory, the distribution of many images."""
