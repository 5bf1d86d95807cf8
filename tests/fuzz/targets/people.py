"""What people type: invites, addresses, run files, the owner's config, and questions to a node."""

from __future__ import annotations

import base64
from contextlib import suppress
from pathlib import Path

from hypothesis import strategies as st

from coordinator import service
from coordinator.core import names
from node import config, control
from protocol import address, blobs, console, identity, invite, runspec
from protocol.errors import Refused
from tests import strategies
from tests.fuzz.target import scratch, split, target
from tests.strategies import KEY, NOW_MS


@target(
    st.builds(
        lambda places, uses, name: invite.encode(
            invite.issue(
                KEY,
                addresses=tuple(places),
                fingerprint="0" * 64,
                name=name,
                token=b"\2" * 16,
                uses=uses,
                expires_ms=NOW_MS,
            )
        ).encode(),
        st.lists(strategies.addresses, min_size=1, max_size=8),
        st.integers(1, 65535),
        st.from_regex(identity.RUN_NAME, fullmatch=True),
    ).map(lambda text: b"text\n" + text)
)
def invitation(data: bytes) -> None:
    """An invite as text; or, after `body`, the bytes behind a text whose check digits fit."""
    how, body = split(data)
    if how == "text":
        text = body.decode("utf-8", "replace")
    else:
        whole = body + invite._check_digits(body)
        text = invite.PREFIX + base64.b32encode(whole).decode().rstrip("=").lower()
    found = invite.decode(text)
    assert invite.decode(invite.encode(found)) == found
    invite.check(found, now_ms=0)


@target(
    strategies.addresses.map(str.encode) | st.just(b"/ip4/10.0.0.1/tcp/4001") | st.just(b"5 GiB") | st.just(b"1h30m")
)
def typed(data: bytes) -> None:
    """Words that people type: addresses, sizes, spans of time, names; and multiaddrs that nodes say."""
    text = data[:2000].decode("utf-8", "replace")
    found = address.parse(text)
    if found is not None:
        assert address.parse(str(found)) == found
        assert isinstance(found.unspecified, bool) and isinstance(found.link_local, bool)
    if service._is_address(text):
        assert text.isascii() and text.startswith("/ip")
    name = names.distinct_name(text, KEY.public, ("keen-otter",))
    assert name and name.isprintable() and len(name) <= 40
    assert names.visible(names.visible(text)) == names.visible(text)
    for parse in (console.parse_size, console.parse_duration):
        with suppress(Refused):
            assert parse(text) > 0
    assert console.printable(text).isprintable()
    blobs.check_digest(text)


@target(st.sampled_from(("threads = 2", 'max_disk = "5GB"', 'name = "keen"\nlisten = "0.0.0.0:4000"')).map(str.encode))
def owners_file(data: bytes) -> None:
    """config.toml, written by the owner."""
    home = config.Home(scratch())
    home.config.write_bytes(data)
    found = config.settings(home, {}, {})
    assert found.threads is None or 1 <= found.threads <= config.THREADS_MAX


@target(
    st.sampled_from((b'{"verb":"pause","arguments":{"seconds":5}}\n', b'{"verb":"leave","arguments":{"purge":true}}\n'))
)
def question(data: bytes) -> None:
    """What comes through the node's own socket, and what its answer is read as."""
    with suppress(Refused):
        control._request(data)
    control._result(data, Path("/"))


_SPEC = runspec.parse('[run]\nname = "fuzz"')


@target(
    st.sampled_from(
        (
            runspec.template("fuzz"),
            '[run]\nname = "a"\n[data]\ncontext = 8\n',
            '[run]\nname = "b"\n[model.config]\nx = [[1]]\n',
        )
    )
    .map(str.encode)
    .map(lambda text: b"toml\n" + text)
    | st.just(b"json\n" + _SPEC.to_json().encode())
)
def run_file(data: bytes) -> None:
    """A run file, and the form of it that a manifest carries."""
    how, body = split(data)
    text = body.decode("utf-8", "replace")
    spec = runspec.RunSpec.from_json(text) if how == "json" else runspec.parse(text)
    assert runspec.RunSpec.from_json(spec.to_json()) == spec
    assert 0 < spec.rate_share(0) <= 1 and spec.rounds.steps(0) >= 1
