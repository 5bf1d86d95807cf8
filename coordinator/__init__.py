"""The researcher's service."""
