"""The rehearsal: whether this machine builds the model of a run, and can hold it, asked before anything is downloaded.

Only where transformers is of another version than the one that the coordinator made the manifest with, or the model is
large: it takes a process that imports torch, some seconds. No weight is allocated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

from node import hardware
from protocol.errors import Code, Refused
from protocol.process import Channel, ChannelClosed, Child, parent_channel
from protocol.sandbox import Sandbox
from protocol.types import Manifest

SECONDS: Final = 120.0  # an import of torch from a slow disk; a config that keeps it busy for longer is refused


async def check_model(manifest: Manifest, *, log: Any = None, sandbox: Sandbox | None = None) -> None:
    """Refuse a run whose model this installation would build in another shape, or not at all. `log`: an open file."""
    here = version("transformers")
    if here == manifest.transformers:
        return  # the same code lays it out; the trainer compares all the same
    found = await _ask({"config": manifest.model_config}, log, sandbox)
    if found.get("layout") != manifest.layout:
        why = found.get("why", "it has other parameters here")
        what = f"the run's model was made with transformers {manifest.transformers}, here is {here}: {why}"
        raise Refused(Code.VERSION, what, fix=f"Run pip install transformers=={manifest.transformers}")


async def choose_device(
    wanted: str, needed: int, *, cap: int | None, log: Any = None, sandbox: Sandbox | None = None
) -> str:
    """The device that would train; refused if there is none, or it cannot hold what is needed. "" if nobody can say."""
    found = await _ask({"device": wanted, "needed": needed, "cap": cap}, log, sandbox)
    if "refused" in found:
        raise Refused.from_wire(found["refused"], found["why"])
    return found.get("device", "")


async def _ask(question: Mapping[str, Any], log: Any, sandbox: Sandbox | None) -> dict[str, str]:
    child = await Child.start(__spec__.name, log=log, sandbox=sandbox)
    try:
        async with asyncio.timeout(SECONDS):
            await child.channel.send(question)
            return {key: str(value) for key, value in (await child.channel.receive()).body.items()}
    except TimeoutError:
        return {"why": f"it was not built within {SECONDS:.0f} s"}
    except ChannelClosed:
        return {"why": "the process that tried to build it ended"}
    finally:
        await child.stop(grace_seconds=0)


async def answer(channel: Channel) -> None:
    """In the child: the digest of the layout that this installation gives the model, or which device holds so much."""
    asked = (await channel.receive()).body
    from protocol import model  # late: it loads torch, which only this process needs

    try:
        if "config" in asked:
            await channel.send({"layout": model.measure(asked["config"]).digest})
            return
        devices = hardware.torch_devices()
        device = hardware.choose_device(asked["device"], devices)
        hardware.check_device(asked["needed"], device, devices, cap=asked["cap"])
        await channel.send({"device": device})
    except Refused as refused:
        await channel.send({"refused": refused.reason.code, "why": refused.what})


async def _main() -> None:
    await answer(await parent_channel())


if __name__ == "__main__":
    asyncio.run(_main())
