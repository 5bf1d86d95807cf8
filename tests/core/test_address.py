"""Where a node may connect to: no nearer than its coordinator is."""

import pytest

from protocol.address import Address, Span, may_dial, span_of

PUBLIC, LAN, SELF, LINK = "8.8.8.8", "192.168.1.7", "127.0.0.1", "169.254.7.7"


@pytest.mark.parametrize(
    ("host", "span"),
    [
        *((each, Span.WORLD) for each in (PUBLIC, "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8")),
        *(
            (each, Span.SITE)
            for each in (LAN, "10.0.0.1", "172.16.0.1", "100.64.1.1", "fd12::1", "fec0::1", "198.51.100.4")
        ),
        *(
            (each, Span.SITE)
            for each in ("::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1", "::10.0.0.1", "4000::1")
        ),
        *((each, Span.MACHINE) for each in (SELF, "127.255.0.3", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1")),
        *((each, Span.LINK) for each in (LINK, "fe80::1")),
        *((each, None) for each in ("0.0.0.0", "::", "224.0.0.251", "ff02::1", "255.255.255.255", "240.0.0.1")),
        *((each, None) for each in ("169.254.169.254", "::ffff:169.254.169.254", "fd00:ec2::254", "100.100.100.200")),
        *((each, None) for each in ("localhost", "", "1.2.3", "0x7f.1", "127.1", "fe80::1%eth0", "1.2.3.4 ")),
    ],
)
def test_how_far_an_address_is_good(host, span):
    assert span_of(host) is span


@pytest.mark.parametrize(
    ("coordinator", "dialled"),
    [
        ("", {PUBLIC}),
        (PUBLIC, {PUBLIC}),
        ("coordinator.example", {PUBLIC}),
        (LAN, {PUBLIC, LAN}),
        ("100.64.3.3", {PUBLIC, LAN}),
        (SELF, {PUBLIC, LAN, SELF}),
        ("::1", {PUBLIC, LAN, SELF}),
        (LINK, {PUBLIC, LAN, SELF, LINK}),
    ],
)
def test_a_peer_is_dialled_no_nearer_than_the_coordinator(coordinator, dialled):
    found = {each for each in (PUBLIC, LAN, SELF, LINK) if may_dial(f"/ip4/{each}/tcp/4001", coordinator=coordinator)}
    assert found == dialled
    assert not may_dial("/ip4/169.254.169.254/tcp/80", coordinator=coordinator)


def test_only_the_invites_own_names_are_looked_up():
    assert may_dial("/dns4/train.example/tcp/1", coordinator=PUBLIC, named=["train.example"])
    assert not may_dial("/dns4/router.local/tcp/1", coordinator=PUBLIC, named=["train.example"])
    assert not may_dial("/dns4/localhost/tcp/1", coordinator=SELF)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "/",
            "8.8.8.8:1",
            "/ip4/8.8.8.8",
            "/ip4/8.8.8.8/udp/1/quic-v1",
            "/ip4/8.8.8.8/tcp/0",
            "/ip4/8.8.8.8/tcp/65536",
        ),
        *(
            "/ip4/8.8.8.8/tcp/-1",
            "/ip4/8.8.8.8/tcp/1/ws",
            "/ip4/8.8.8.8/tcp/1\n",
            "/unix/tmp/x.sock",
            "/ip4/8.8.8.8/tcp/١",
        ),
        *("/ip4/192.168.0.1/tcp/1/p2p/Qm/p2p-circuit", "/ip4/8.8.8.8/tcp/1/p2p/Qm/p2p-circuit/ip4/10.0.0.1/tcp/1"),
        *("/ip6/fd12::1/tcp/1", "/ip6zone/eth0/ip6/fe80::1/tcp/1", "/ip4/8.8.8.8/tcp/" + "1" * 5000),
    ],
)
def test_what_is_no_address_of_a_machine_in_the_world_is_not_dialled(text):
    assert not may_dial(text, coordinator=PUBLIC)


def test_a_relay_is_judged_by_where_it_is():
    assert may_dial("/ip4/8.8.8.8/tcp/1/p2p/QmRelay/p2p-circuit/p2p/QmPeer", coordinator=PUBLIC)
    assert may_dial("/ip6/2606:4700::1111/tcp/4001/p2p/12D3Koo", coordinator=PUBLIC)


def test_who_listens_on_all_of_ipv6_listens_on_all_of_ipv4_too():
    assert Address("::", 49302).multiaddrs == ("/ip4/0.0.0.0/tcp/49302", "/ip6/::/tcp/49302")
    assert Address("0.0.0.0", 0).multiaddrs == ("/ip4/0.0.0.0/tcp/0",)
    assert Address("2a00:1450::5", 443).multiaddrs == ("/ip6/2a00:1450::5/tcp/443",)
