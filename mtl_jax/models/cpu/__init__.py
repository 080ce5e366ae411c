"""Forms of convolution and pooling that are fast on XLA's CPU backend."""
