"""All that reads a stranger's bytes; to import this is to have them in TARGETS."""

from tests.fuzz.target import TARGETS
from tests.fuzz.targets import blobs, disk, documents, lies, people, values, vectors, wire

__all__ = ["TARGETS", "blobs", "disk", "documents", "lies", "people", "values", "vectors", "wire"]
