"""What nodes are called: names that can be shown, and that nobody takes for another's. Knows no node but by its id."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from protocol.limits import NAME_CHARACTERS_MAX
from protocol.types import NodeId

MARKS_MAX: Final = 2  # on one letter
NAMES_KEPT: Final = 4096  # as people see them: whoever comes is compared with all who have
_ANIMALS: Final = re.findall(
    r"\w+",
    """
    badger beaver bison crane dormouse eagle falcon ferret finch gecko heron ibex jackdaw kestrel
    lark lynx marten marmot mole newt otter owl plover puffin raven robin shrew stoat swift tern vole wren
""",
)
_ADJECTIVES: Final = re.findall(
    r"\w+",
    """
    able brave brisk calm careful clever daring deft eager early fair fond gentle glad hardy jolly
    keen kind lively merry mild nimble patient plucky quick quiet ready sharp steady sturdy warm wise
""",
)
_RESERVED: Final = frozenset({"coordinator", "researcher", "barnraise", "admin"})
_LOOKALIKES: Final = str.maketrans(
    {
        **dict(zip("авдеһіјкӏмнорԛгѕтуԝхԁ", "abaehijklmhopqrstywxd", strict=True)),  # Cyrillic
        **dict(zip("αβεηικνορτυχω", "abenikvoptuxw", strict=True)),  # Greek
        **dict(zip("013458|łøđı$@", "oleasbllodlsa", strict=True)),
    }
)


def visible(text: str) -> str:
    """Stranger's text as one line: composed, without controls, directions or what cannot be seen."""
    kept, marks = [], 0
    for character in unicodedata.normalize("NFC", text[:1024]):
        kind = unicodedata.category(character)
        if kind.startswith("Z") or character in "\t\n\r":
            character = " "
        elif kind.startswith("C") or character in "\u115f\u1160\u3164\uffa0\u2800":
            continue  # and the marks around it stand on one letter
        marks = marks + 1 if kind.startswith("M") else 0
        if marks <= MARKS_MAX:
            kept.append(character)
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))


def distinct_name(wished: str, node: NodeId, others: Iterable[str]) -> str:
    """A name that can be shown, and that nobody takes for another node's."""
    name = visible(wished)[:NAME_CHARACTERS_MAX].strip() or generated_name(node)
    taken = {_skeleton(other) for other in others} | {_skeleton(word) for word in _RESERVED}
    if _skeleton(name) not in taken:
        return name
    suffix = f"-{node[:8]}"
    return name[: NAME_CHARACTERS_MAX - len(suffix)].strip() + suffix


def generated_name(node: NodeId) -> str:
    seed = hashlib.sha256(node.encode()).digest()
    return f"{_ADJECTIVES[seed[0] % len(_ADJECTIVES)]}-{_ANIMALS[seed[1] % len(_ANIMALS)]}"


@lru_cache(maxsize=NAMES_KEPT)
def _skeleton(name: str) -> str:
    """What a hurried reader sees: equal for names that look alike."""
    plain = unicodedata.normalize("NFKD", name).casefold()
    letters = "".join(c for c in plain if not unicodedata.combining(c)).translate(_LOOKALIKES)
    return "".join(c for c in letters if c.isalnum()).replace("rn", "m").replace("vv", "w").replace("i", "l")
