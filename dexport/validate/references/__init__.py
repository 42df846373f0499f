"""What a bundle is compared with: a PyTorch network with the weights that the bundle was built from."""
