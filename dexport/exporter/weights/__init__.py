"""Weights by name, read one at a time, from files that nobody vouches for."""
