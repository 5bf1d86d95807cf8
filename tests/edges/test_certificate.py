"""A coordinator that takes a new TLS certificate: real doors one after the other at one port, a real link, a real folder."""

import pytest
import test_service
from test_service import refused

from coordinator.service import CoordinatorService, serve
from node.link import Beat
from node.membership import Membership
from protocol import invite, tls
from protocol.errors import Code, Exit
from protocol.identity import Key

world = test_service.world


async def serve_again(world, key, cert):
    """The same coordinator at the same port, with what it has for a certificate now."""
    port = world.server.port
    await world.server.stop(None)
    service = CoordinatorService(world.desk)
    files = {"key": key, "certificate": cert, "sockets": world.desk.folder / "door"}
    world.server = await serve(service, listen=f"127.0.0.1:{port}", **files)


def pair_of(world):
    return world.desk.folder / "tls.key", world.desk.folder / "tls.pem"


def membership(world, link, folder):
    return Membership(link._key.public, link, invite.decode(world.invite(uses=9)), "heron", folder)


@pytest.fixture
def owner(world):
    return tls.Owner(world.desk.key, world.desk.run, 2000)


async def test_nodes_and_old_invites_follow_a_new_certificate_and_refuse_the_old_one_afterwards(world, owner, tmp_path):
    pair, old = pair_of(world), (tmp_path / "old.key", tmp_path / "old.pem")
    for path, copy in zip(pair, old, strict=True):
        copy.write_bytes(path.read_bytes())
    invited, link, folder = world.invite(), world.link(), tmp_path / "run"
    member = membership(world, link, folder)
    await member.begin(known=False)
    tls.replace_certificate(*pair, [], owner)
    await serve_again(world, *pair)
    assert (await refused(link.heartbeat(Beat("training")))).reason is Code.UNREACHABLE
    await member.enter()  # as a running node does after some failures
    await link.heartbeat(Beat("training"))
    await world.link().open(life=1, invite=invited)  # made before, and still good

    await serve_again(world, *old)  # whoever has stolen the old key
    impostor = await refused(member.enter())
    assert (impostor.reason, impostor.reason.exit) == (Code.PIN_MISMATCH, Exit.INTEGRITY)
    again = world.again(link)
    later = membership(world, again, folder)
    assert (await refused(later.begin(known=True))).reason is Code.PIN_MISMATCH  # it remembers over a restart


async def test_a_certificate_that_the_run_does_not_endorse_is_a_hard_stop(world, tmp_path):
    stranger = Key.generate()
    forger = tls.Owner(stranger, world.desk.run, 9000)
    forged = tmp_path / "forged.key", tmp_path / "forged.pem"
    tls.make_certificate(*forged, [], forger)
    link = await world.member()
    await serve_again(world, *forged)
    assert (await refused(link.open(life=1))).reason is Code.PIN_MISMATCH
    assert (await refused(world.link().open(life=1, invite=world.invite()))).reason is Code.PIN_MISMATCH
