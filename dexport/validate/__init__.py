"""Proof that what was built computes what the checkpoint computes."""
