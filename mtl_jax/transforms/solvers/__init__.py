"""Solvers for weights, exact for the Gram matrix they are given."""
