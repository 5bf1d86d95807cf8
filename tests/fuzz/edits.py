"""One edit of some bytes, as likely to get past a parser as not: a JSON value keeps its form, all else is cut and glued."""

from __future__ import annotations

import json
from random import Random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        65535,
        65536,
        2**31,
        2**53,
        2**63 - 1,
        2**63,
        2**64,
        10**400,
        0.5,
        1e308,
        [],
        {},
        "",
    ),
    *("0", "a" * 64, "../../etc/passwd", "\0", "\x1b[2J", "'; DROP TABLE nodes; --", "é" * 300, "\ud800", "NaN"),
    *("/ip4/0.0.0.0/tcp/0", "${jndi:ldap://a}", "{{7*7}}", "__class__", "auto_map", "file:///etc/passwd", "\u202e"),
)
NUMBERS = (b"\0", b"\xff", b"\xff" * 2, b"\0\x80", b"\0\0\0\x80", b"\xff\xff\xff\x7f", b"\xff" * 8, b"\0" * 7 + b"\x80")
TEXTS = (  # what a text file can hold that its reader may not have thought of
    *(b"0x" + b"f" * 5000, b"9" * 5000, b"1e999", b"nan", b"[" * 5000, b"a." * 3000, b"1979-05-27", b'"""', b"\\u0000"),
    *(
        b"\xef\xbb\xbf",
        b"\r\n",
        b"\xed\xa0\x80",
        "\u202e".encode(),
        b"::ffff:0.0.0.0",
        b"%eth0",
        b"00",
        b"-1",
        b"\x1b]0;x\7",
    ),
)
DEPTHS = (9, 100, 990, 5000)  # about the limits of our own checks, of Python's stack, and beyond


def edited(data: bytes, luck: Random) -> bytes:
    """These bytes with one to three edits. What stands before the first line end is a header, and mostly left alone."""
    head, end, body = data.partition(b"\n")
    if not end or luck.random() < 0.1:
        head, end, body = b"", b"", data
    for _ in range(luck.choice((1, 1, 2, 3))):
        body = _json_edited(body, luck) if luck.random() < 0.7 else _bytes_edited(body, luck)
    return head + end + body


def _json_edited(body: bytes, luck: Random) -> bytes:
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        return _bytes_edited(body, luck)
    if luck.random() < 0.02:
        depth = luck.choice(DEPTHS)
        return body.replace(b"[]", b"[" * depth + b"]" * depth, 1)
    tree = _tree_edited(tree, luck)
    try:
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
            "utf-8", "surrogatepass"
        )
    except (ValueError, RecursionError, TypeError):
        return body


def _tree_edited(tree: Any, luck: Random) -> Any:
    holders = [holder for holder in _holders(tree) if holder]
    if not holders:
        return luck.choice(HOSTILE)
    holder = luck.choice(holders)
    key = luck.choice(list(holder)) if isinstance(holder, dict) else luck.randrange(len(holder))
    match luck.randrange(5):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.extend(holder[key : key + 1] * luck.choice((1, 2, 70)))
        case 1:
            holder[luck.choice(("", "a", "__class__", "\x1b", str(key) + "_"))] = holder[key]
        case 2:  # something from elsewhere in the same value
            other = luck.choice(holders)
            holder[key] = json.loads(
                json.dumps(luck.choice(list(other.values() if isinstance(other, dict) else other)))
            )
        case 3 if type(holder[key]) is int:
            holder[key] += luck.choice((1, -1, 65536, -65536))
        case _:
            holder[key] = json.loads(json.dumps(luck.choice(HOSTILE)))
    return tree


def _holders(tree: Any) -> list[Any]:
    """The objects and lists of a JSON value."""
    found = [tree] if isinstance(tree, dict | list) else []
    for holder in found:  # grows meanwhile
        found.extend(
            item for item in (holder.values() if isinstance(holder, dict) else holder) if isinstance(item, dict | list)
        )
    return found


def _bytes_edited(body: bytes, luck: Random) -> bytes:
    at = luck.randrange(len(body) + 1)
    end = min(len(body), at + luck.choice((1, 1, 2, 4, 8, 64)))
    match luck.randrange(7):
        case 6:
            return body[:at] + luck.choice(TEXTS) + body[end:]
        case 0:
            return body[:at]
        case 1:
            return body[:at] + body[end:]
        case 2:
            return body[:at] + body[at:end] * luck.choice((2, 3, 40)) + body[end:]
        case 3:
            return body[:at] + luck.choice(NUMBERS) + body[end:]
        case 4:
            return body[:at] + luck.randbytes(luck.choice((1, 2, 16))) + body[end:]
        case _:
            flipped = bytes(byte ^ 1 << luck.randrange(8) for byte in body[at : at + 1])
            return body[:at] + flipped + body[at + 1 :]
