"""One target under atheris, in a process of its own: `python -m tests.fuzz.one NAME CORPUS …`, the rest is libFuzzer's."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import atheris

from tests.fuzz.edits import edited

with atheris.instrument_imports(include=["protocol", "node", "coordinator"]):
    from tests.fuzz.targets import TARGETS
    from tests.strategies import examples

SEEDS = 100


def plant(name: str, corpus: Path) -> None:
    """Write the target's seeds, the same ones each time."""
    for index, seed in enumerate(examples(TARGETS[name].seeds, SEEDS)):
        (corpus / f"seed-{index:03}").write_bytes(seed)


def mutate(data: bytes, size_max: int, seed: int) -> bytes:
    """Half of the time an edit that knows the form, half of the time one of libFuzzer's, which knows the coverage."""
    luck = Random(seed)
    return edited(data, luck)[:size_max] if luck.random() < 0.5 else atheris.Mutate(data, size_max)


def main() -> None:
    _, name, corpus, *options = sys.argv
    plant(name, Path(corpus))
    atheris.Setup([sys.argv[0], corpus, *options], TARGETS[name].read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
