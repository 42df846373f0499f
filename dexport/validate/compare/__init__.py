"""A bundle beside its reference, graph by graph: the first block that computes something else, and what mends it."""
