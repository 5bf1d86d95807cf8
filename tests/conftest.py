"""For all tests."""

# Hypothesis imports it in the middle of a test, and pytest rewrites it then. If what is collected meanwhile fails to end, and
# is told of with a traceback, a fault of CPython 3.11 (gh-106905) makes the import fail.
import hypothesis.internal.conjecture.optimiser  # noqa: F401
