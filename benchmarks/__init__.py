"""Costs of the project and its peers; run from the repository's root."""
