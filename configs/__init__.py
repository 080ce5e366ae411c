"""Configs of plain values, with one file a problem and one entry a method.

A regular package, so that another `configs` on the path cannot shadow it.
"""
