"""torchft's DiLoCo over gloo: fp32 pseudo-gradients every so many steps, Nesterov outside, a lighthouse to meet at."""

import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch
from task import begin

PORT = 29510


def main():
    task = begin()
    if task.index is None:
        words = ("--bind", f"{task.hub}:{PORT}", "--min_replicas", str(task.workers), "--join_timeout_ms", "2000")
        task.say(f"http://{task.hub}:{PORT}")
        lighthouse = str(Path(sys.executable).with_name("torchft_lighthouse"))
        os.execv(lighthouse, [lighthouse, *words])
    here = task.addresses[task.index]
    socket.gethostname = lambda: here  # as of a machine whose name others can look up
    from torchft.checkpointing.http_transport import HTTPTransport
    from torchft.local_sgd import DiLoCo
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo

    store = torch.distributed.TCPStore(here, 29600, is_master=True, wait_for_workers=False)
    model = task.model()
    inner = task.optimizer(model.parameters())
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=60)),
        state_dict=lambda: {"model": model.state_dict(), "inner": inner.state_dict()},
        load_state_dict=lambda state: (model.load_state_dict(state["model"]), inner.load_state_dict(state["inner"])),
        min_replica_size=task.workers,
        use_async_quorum=False,
        rank=0,
        world_size=1,
        store_addr=here,
        store_port=store.port,
        lighthouse_addr=task.meeting,
        replica_id=f"worker{task.index}",
        hostname=here,
        checkpoint_transport=HTTPTransport(timeout=timedelta(seconds=60), num_chunks=0),
    )
    task.ready()
    with DiLoCo(manager, [model], inner, outer, sync_every=task.inner_steps):
        for step in range(task.steps):
            task.step(step, model, inner)
    task.done(model)
    os._exit(0)  # its threads would wait for each other


main()
