"""Runs one of our commands unchanged, but dies by SIGKILL at a named stage when it is told to.

    python -m tests.chaos.victim NAME barnraise start ...

Nothing in the product knows of this. The functions that stand for a stage are wrapped; entering one looks for the
file NAME in the folder $BARNRAISE_CHAOS. If that says `stage:count`, the count-th entry removes the file and kills
the node (or the coordinator) whole: the children run under the same wrapper, and kill their owner.
"""

import asyncio
import functools
import importlib
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

FOLDER = "BARNRAISE_CHAOS"
NODE_STAGES = (
    *("download", "verify", "load", "step", "promise", "begin", "send", "reduce"),
    *("vote", "voted", "commit", "fold", "save", "sync"),
)
COORDINATOR_STAGES = ("effect", "transaction", "entry", "leases", "roster", "blob", "checkpoint", "sync")
CHILDREN = ("node.swarm", "node.trainer")
_one_at_a_time = threading.Lock()  # the engine reduces in threads


def main():
    name, program, *arguments = sys.argv[1:]
    die_at = functools.partial(_die_at, Path(os.environ[FOLDER]) / name)
    if program in CHILDREN:
        module = importlib.import_module(program)
        (_in_engine if program == "node.swarm" else _in_trainer)(
            functools.partial(die_at, process=int(os.environ["BARNRAISE_PARENT"]))
        )
        asyncio.run((getattr(module, "main", None) or module._main)())
        return
    sys.argv = [program, *arguments]
    if program == "barnraise":
        _in_node(die_at, name)
        from node.cli import main as command
    else:
        _in_coordinator(die_at)
        from coordinator.cli import main as command
    command()


def _die_at(order, stage, process=None):
    """Called whenever a stage is entered; usually there is no order."""
    if not order.exists():
        return
    with _one_at_a_time:
        try:
            wanted, _, count = order.read_text().partition(":")
        except FileNotFoundError:
            return
        if wanted != stage:
            return
        if int(count) > 1:
            new = order.with_suffix(".new")
            new.write_text(f"{wanted}:{int(count) - 1}")
            new.replace(order)
            return
        order.unlink()
        os.kill(process or os.getpid(), signal.SIGKILL)
        signal.pause() if threading.current_thread() is threading.main_thread() else threading.Event().wait()


def _in_node(die_at, name):
    import protocol.blobs
    from node import journal, letters, replica
    from protocol.messages import Begin, Commit
    from protocol.process import Child

    _before(protocol.blobs.Writer, "write", lambda *_: die_at("download"))
    _before(protocol.blobs.Writer, "finish", lambda *_: die_at("verify"))
    _before(replica.Replica, "load", lambda *_: die_at("load"))
    _before(journal.Journal, "save_promise", lambda _, promise: die_at("vote" if promise.accepted else "promise"))
    _after(journal.Journal, "save_promise", lambda _, promise: promise.accepted and die_at("voted"))
    _before(replica, "fold", lambda *_: die_at("fold"))
    _before(journal.Journal, "save_base", lambda *_: die_at("save"))
    stages = {Begin: "begin", Commit: "commit"}
    _before(letters, "seal", lambda _, message: type(message) in stages and die_at(stages[type(message)]))
    _before(os, "fsync", lambda *_: die_at("sync"))
    start = Child.start.__func__

    async def start_as_victim(cls, module, *arguments, **options):
        words = ("tests.chaos.victim", name, module) if module in CHILDREN else (module,)
        return await start(cls, *words, *arguments, **options)

    Child.start = classmethod(start_as_victim)


def _in_engine(die_at):
    from node.reduction import SpanContainer, SpanReducer

    _before(SpanContainer, "iterate_input_parts_for", lambda *_: die_at("send"))
    _before(SpanReducer, "_publish", lambda *_: die_at("reduce"))


def _in_trainer(die_at):
    from node.trainer import Learner

    _before(Learner, "step", lambda *_: die_at("step"))


def _in_coordinator(die_at):
    import protocol.blobs
    from coordinator import engine
    from coordinator.store import Store

    _before(engine.Coordinator, "_carry_out", lambda *_: die_at("effect"))
    _before(Store, "save_leases", lambda *_: die_at("leases"))
    _after(Store, "append_entry", lambda *_: die_at("entry"))
    _after(Store, "save_roster", lambda *_: die_at("roster"))
    _before(protocol.blobs.Writer, "finish", lambda *_: die_at("blob"))
    _before(protocol.blobs.BlobStore, "put_file", lambda *_: die_at("checkpoint"))
    _before(os, "fsync", lambda *_: die_at("sync"))
    writing = Store._writing

    @contextmanager
    def torn(store):
        with writing(store) as connection:
            yield connection
            die_at("transaction")  # all is written and nothing is committed

    Store._writing = torn


def _before(owner, name, look):
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*arguments, **options):
        look(*arguments)
        return inner(*arguments, **options)

    setattr(owner, name, outer)


def _after(owner, name, look):
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*arguments, **options):
        result = inner(*arguments, **options)
        look(*arguments)
        return result

    setattr(owner, name, outer)


if __name__ == "__main__":
    main()
