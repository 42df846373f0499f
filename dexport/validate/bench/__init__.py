"""Times of models beside each other and beside PyTorch."""
