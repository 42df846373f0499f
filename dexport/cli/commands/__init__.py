"""The commands, one file each or for a few verbs of one thing; what prints their results lies beside them."""
