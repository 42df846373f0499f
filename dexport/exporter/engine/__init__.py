"""TensorRT engines: which TensorRT builds them and for which GPUs, and the child process that does."""
