"""Every call of the coordinator's service with any fields at all, over a real door: answered, or refused by name."""

import grpc
import pytest
from test_service import a_world

from node.link import Beat
from protocol.errors import Code
from protocol.limits import PROTOCOL_VERSION
from protocol.v1 import barnraise_pb2 as wire
from tests import strategies

CALLS = {
    "Heartbeat": wire.HeartbeatRequest,
    "AcquireLeases": wire.LeaseRequest,
    "ReadLog": wire.ReadLogRequest,
    "PushEntry": wire.PushEntryRequest,
    "ReadBlob": wire.ReadBlobRequest,
    "ReadLeaves": wire.ReadLeavesRequest,
    "WriteBlob": wire.BlobChunk,
    "Challenge": wire.ChallengeRequest,
    "Open": wire.OpenRequest,
    "Leave": wire.LeaveRequest,
}
NAMED = {code.code for code in Code} - {Code.INTERNAL.code}
EXAMPLES = 20


def within_reason(method, message):
    """As it was drawn, but for what would only take time or end at the first field each time."""
    if method == "Heartbeat":
        message.wait_seconds = min(message.wait_seconds, 0.0)
        if len(message.lease_ids) % 2:
            message.activity = "training"
    if method in ("Challenge", "Open") and message.protocol % 4:
        message.protocol = PROTOCOL_VERSION
    return message


async def call(link, method, message):
    """The code of the refusal; none for an answer."""
    begin = getattr(link._stub, method)
    try:
        match method:
            case "ReadBlob":
                async for _ in begin(message, timeout=20, metadata=link._metadata()):
                    pass
            case "WriteBlob":
                await begin(iter([message, message]), timeout=20, metadata=link._metadata())
            case _:
                await begin(message, timeout=20, metadata=link._metadata())
    except grpc.aio.AioRpcError as error:
        return dict(error.trailing_metadata()).get("barnraise-code", error.code().name)
    return None


@pytest.fixture
async def world(tmp_path):
    async with a_world(tmp_path) as world:
        world.service.gate.blame = lambda passage: None  # this many refusals cost a stranger the connection
        yield world


@pytest.mark.parametrize("method", CALLS)
async def test_any_fields_are_answered_or_refused_by_name(method, world):
    link, _ = await world.training()
    honest, _ = await world.training()
    before = world.desk.state.head
    said = []
    for message in strategies.examples(strategies.of_message(CALLS[method]), EXAMPLES):
        if method == "Leave" and said and said[-1] is None:
            link = await world.member()
        said.append(await call(link, method, within_reason(method, message)))
    assert set(said) <= NAMED | {None}
    assert world.desk.state.head == before
    assert (await honest.heartbeat(Beat("training"))).head_round == 0
