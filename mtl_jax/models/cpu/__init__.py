"""Forms of convolution and pooling that XLA's CPU backend is fast at."""
