"""What the project costs, beside its peers; run from the repository's root."""
