"""The recounter over real evidence: who made a mean up is struck, and nobody else."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio

from coordinator.recounter import Recounter
from protocol.types import Fault
from tests.core.test_evidence import CHUNK, INT4, NODES, P, basis_of, blob, encoded, honest, reduced, slices_of


class Stand:
    def __init__(self, folder):
        self.struck = []
        self.recounter = Recounter(
            folder / "evidence",
            INT4,
            share=1.0,
            heard_ms=lambda node: 1.0,
            now_ms=lambda: 0.0,
            strike=lambda *proved: self.struck.append(proved),
        )

    async def show(self, evidence):
        """As its upload ends; returns once it has been looked at."""
        self.recounter.blobs.put_bytes(evidence)
        self.recounter.stir()
        async with asyncio.timeout(30):
            while self.recounter.blobs.digests():
                await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def stand(tmp_path):
    stand = Stand(tmp_path)
    running = asyncio.create_task(stand.recounter.run())
    yield stand
    running.cancel()


def made_up():
    payloads = encoded()
    evidence = blob(basis_of(payloads), slices_of(payloads))
    return *reduced(INT4.down.encode(np.full(P - CHUNK, 0.01, np.float32)), evidence), evidence


@pytest.mark.asyncio
async def test_a_reducer_that_makes_a_mean_up_is_struck_and_an_honest_one_is_not(stand):
    for record, part, evidence in (honest(), made_up()):
        stand.recounter.certified(record)
        assert stand.recounter.asked(NODES[1]) == (part.evidence,) and stand.recounter.asked(NODES[0]) == ()
        await stand.show(evidence)
        assert stand.recounter.asked(NODES[1]) == ()
        stand.recounter.gone_back(0)  # so that the same round can be certified again
    ((node, fault, round_number, reason, digest),) = stand.struck
    assert (node, fault, round_number, digest) == (NODES[1], Fault.REDUCED_WRONG, 7, part.evidence.digest)
    assert "the mean of these 3 slices" in reason


@pytest.mark.asyncio
async def test_a_part_that_its_reducer_did_not_sign_strikes_nobody(stand):
    record, part, evidence = made_up()
    brought = (*record.contributions[:2], replace(record.contributions[2], tokens=51))
    stand.recounter.certified(replace(record, contributions=brought))
    await stand.show(evidence)
    assert stand.struck == [] and stand.recounter.asked(NODES[1]) == ()
