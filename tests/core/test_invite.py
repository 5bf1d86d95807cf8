"""Invites: they survive mail and chat, a changed one is caught offline, a forged one before any connection."""

import base64
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import identity, invite
from protocol.errors import Code, Exit, Refused
from protocol.identity import Key

KEY = Key.generate()
ENDS = 1_900_000_000_000
PLAIN = {"fingerprint": "ab" * 32, "name": "tiny", "token": bytes(16), "uses": 1, "expires_ms": ENDS}
INVITE = invite.issue(KEY, addresses=("train.example.org:49300", "[2001:db8::7]:49300"), **PLAIN)
TEXT = invite.encode(INVITE)


def refused(text):
    with pytest.raises(Refused) as caught:
        invite.decode(text)
    return caught.value


def resealed(body):
    """A word whose check digits are right, as a forger would make it."""
    return invite.PREFIX + base64.b32encode(body + invite._check_digits(body)).decode().rstrip("=").lower()


def unsealed(text):
    word = text.removeprefix(invite.PREFIX).upper()
    return base64.b32decode(word + "=" * (-len(word) % 8))[:-4]


def test_an_invite_comes_back_as_it_was():
    assert invite.decode(TEXT) == INVITE
    assert TEXT.startswith("barnraise:") and TEXT.isprintable() and " " not in TEXT
    assert len(TEXT) < 420


def test_the_longest_invite_fits():
    host = ".".join(["a" * 60] * 4)
    longest = invite.issue(KEY, addresses=tuple(f"{host}:{49300 + n}" for n in range(8)), **PLAIN | {"name": "a" * 40})
    assert invite.decode(invite.encode(longest)) == longest


@given(st.lists(st.integers(0, len(TEXT)), max_size=20), st.sampled_from([" ", "\n", "\r\n\t", "\u200b", "\u00a0"]))
def test_wrapped_text_is_joined_again(places, gap):
    text = TEXT
    for place in places:
        text = text[:place] + gap + text[place:]
    assert invite.decode(text) == INVITE


@pytest.mark.parametrize("text", [TEXT.upper(), TEXT.title(), f'"{TEXT}"', f"<{TEXT}>", f"`{TEXT}`\n"])
def test_folded_case_and_quotes_do_no_harm(text):
    assert invite.decode(text) == INVITE


@pytest.mark.parametrize(
    "text", ["", "  \n", "hello", "https://example.org/x", f"Hi Ann, please join: {TEXT}", "barnraise", "b" * 99_999]
)
def test_what_is_no_invite_is_told_how_one_starts(text):
    caught = refused(text)
    assert caught.reason is Code.INVITE_MALFORMED
    assert "starts with barnraise:" in caught.what + caught.fix
    assert len(caught.what) < 200


@given(st.integers(len(invite.PREFIX), len(TEXT) - 1), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
def test_one_changed_character_is_caught_offline(place, character):
    if TEXT[place] != character:
        assert refused(TEXT[:place] + character + TEXT[place + 1 :]).reason is Code.INVITE_MISTYPED


@pytest.mark.parametrize("length", range(1, 6))
def test_an_invite_has_one_spelling_whatever_bits_are_left_over(length):
    text = invite.encode(invite.issue(KEY, addresses=("a.org:1",), **PLAIN | {"name": "a" * length}))
    for character in "abcdefghijklmnopqrstuvwxyz234567":
        if character != text[-1]:
            assert refused(text[:-1] + character).reason is Code.INVITE_MISTYPED


@given(st.integers(len(invite.PREFIX), len(TEXT) - 2))
def test_two_characters_that_changed_places_are_caught_offline(place):
    if TEXT[place] != TEXT[place + 1]:
        assert refused(TEXT[:place] + TEXT[place + 1] + TEXT[place] + TEXT[place + 2 :]).reason is Code.INVITE_MISTYPED


@given(st.integers(len(invite.PREFIX), len(TEXT) - 1))
def test_a_truncated_invite_is_caught_offline(end):
    assert refused(TEXT[:end]).reason is Code.INVITE_MISTYPED


def test_a_character_that_no_invite_holds_is_pointed_at():
    assert "no invite holds '0', the character 3 after barnraise:" in refused("barnraise:ab0d").what


def test_an_invite_ends_on_its_date():
    invite.check(INVITE, now_ms=ENDS - 1)
    for late in (0, 1000, 365 * 86_400_000):
        with pytest.raises(Refused) as caught:
            invite.check(INVITE, now_ms=ENDS + late)
        assert caught.value.reason is Code.INVITE_EXPIRED
        assert caught.value.reason.exit is Exit.REFUSED
        assert "2030-03-17 at 17:46 UTC" in caught.value.what


@pytest.mark.parametrize(
    "change",
    [
        {"addresses": ("evil.example.org:49300",)},
        {"fingerprint": "cd" * 32},
        {"coordinator": Key.generate().public},
        {"name": "other"},
        {"token": "11" * 16},
        {"uses": 1000},
        {"expires_ms": ENDS + 1},
        {"signature": "00" * 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_nothing_in_an_invite_can_be_changed_by_a_forger(change):
    caught = refused(invite.encode(replace(INVITE, **change)))
    assert caught.reason is Code.INVITE_FORGED
    assert caught.reason.exit is Exit.INTEGRITY


def test_a_coordinator_honours_the_ticket_of_its_own_invites_only():
    assert identity.check_ticket(KEY.public, INVITE.ticket, 0).token == INVITE.token
    with pytest.raises(Refused):
        identity.check_ticket(Key.generate().public, INVITE.ticket, 0)
    with pytest.raises(Refused):
        identity.check_ticket(KEY.public, replace(INVITE, fingerprint="cd" * 32).ticket, 0)


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0:49300",
        "[::]:49300",
        "224.0.0.1:49300",
        "example.org:0",
        "example.org:65536",
        "example.org:049300",
        "example.org",
        "file:///etc/passwd",
        "unix:/tmp/x.sock",
        "unix:1",
        "https://example.org:49300",
        "user@example.org:1",
        "example.org/x:1",
        "2852039166:80",
        "0xa9fea9fe:80",
        "169.254.43518:80",
        "[fe80::1%eth0]:80",
        "::1:80",
        "exa mple.org:1",
        ":80",
        "a" * 64 + ".org:1",
    ],
)
def test_an_invite_names_only_hosts_and_ports(text):
    hostile = invite.encode(replace(INVITE, addresses=(text,)))
    if text != "unix:1":  # a host may be called unix
        assert refused(hostile).reason is Code.INVITE_MALFORMED
    else:
        assert refused(hostile).reason is Code.INVITE_FORGED


def test_an_invite_names_one_to_eight_addresses():
    for count in (0, 9, 200):
        assert refused(invite.encode(replace(INVITE, addresses=("a.org:1",) * count))).reason is Code.INVITE_MALFORMED


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]", "[::ffff:a9fe:a9fe]", "[fd00:ec2::254]"])
def test_a_clouds_metadata_service_is_refused_unless_allowed(host):
    signed = invite.issue(KEY, addresses=("example.org:1", f"{host}:80"), **PLAIN)
    assert invite.decode(invite.encode(signed)) == signed
    with pytest.raises(Refused, match="inside your own network"):
        invite.check(signed, now_ms=0)
    invite.check(signed, now_ms=0, allow_private=True)


def test_this_machine_and_the_local_network_may_be_named():
    invite.check(invite.issue(KEY, addresses=("127.0.0.1:1", "192.168.1.2:1", "localhost:1"), **PLAIN), now_ms=0)


def test_an_issuer_is_told_when_its_address_leads_nowhere():
    with pytest.raises(Refused, match=r"0\.0\.0\.0:49300 is not an address"):
        invite.issue(KEY, addresses=("0.0.0.0:49300",), **PLAIN)


def test_a_later_format_asks_for_an_upgrade():
    assert refused(resealed(b"\x02" + unsealed(TEXT)[1:])).reason is Code.VERSION


def test_bytes_after_the_end_are_refused():
    assert refused(resealed(unsealed(TEXT) + b"\0")).reason is Code.INVITE_MALFORMED


@given(st.binary(min_size=1, max_size=300), st.integers(0, 400))
def test_hostile_bytes_with_good_check_digits_raise_nothing_but_a_refusal(tail, keep):
    refused(resealed(unsealed(TEXT)[:keep] + tail))
    refused(resealed(b"\x01" + tail))


@given(st.text())
def test_any_other_text_raises_nothing_but_a_refusal(text):
    refused(text)
    refused(invite.PREFIX + text)
