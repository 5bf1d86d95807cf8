"""Faults done to real processes, and what became of the rounds."""
