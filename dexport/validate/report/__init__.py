"""The report of a validation: its JSON, the baseline that it is held to, and the views that people and CI read."""
