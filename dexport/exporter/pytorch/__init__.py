"""PyTorch as the export needs it: its global state and threads, the paths of modules, what a network returns."""
