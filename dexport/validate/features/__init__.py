"""Feature networks that distances between image sets are measured in, each under its own name."""
