"""One file a problem, one entry a method; plain values.

A regular package, so that another `configs` on the path cannot shadow it.
"""
