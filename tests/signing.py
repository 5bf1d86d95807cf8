"""Engines without a daemon: each signs what it sends, as its daemon would."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from node.engine import AveragingJob, AveragingOutcome, Engine
from protocol.codec import Codec
from protocol.evidence import sign_slices
from protocol.identity import Key
from protocol.types import Exchange

KEYS: defaultdict[str, Key] = defaultdict(Key.generate)  # of the nodes whose peers these are


class SigningEngine(Engine):
    """Fills in what a job says of members and signatures."""

    up: Codec

    @classmethod
    async def start(cls, **settings: Any) -> SigningEngine:
        engine = await super().start(**settings)
        assert isinstance(engine, cls)
        engine.up = settings["packing"].up
        return engine

    async def average(self, job: AveragingJob, payload: bytes) -> AveragingOutcome:
        job = replace(job, members=tuple(KEYS[peer].public for peer in job.peers))
        if payload and job.exchange is Exchange.ALL_REDUCE:
            signatures = sign_slices(KEYS[self.peer], job.group, payload, job.spans, self.up)
            job = replace(job, signatures=signatures)
        return await super().average(job, payload)
