"""Rows of methods; see `method_row`."""

METHODS = ()
