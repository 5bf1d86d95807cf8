"""Plain data-parallel training: torch DistributedDataParallel over gloo. Every step exchanges every gradient."""

import torch.distributed as dist
from task import begin
from torch.nn.parallel import DistributedDataParallel


def main():
    task = begin()
    meeting = f"tcp://{task.addresses[0]}:29500"
    dist.init_process_group("gloo", init_method=meeting, rank=task.index, world_size=task.workers)
    model = task.model()
    parallel = DistributedDataParallel(model)
    optimizer = task.optimizer(model.parameters())
    dist.barrier()
    task.ready()
    for step in range(task.steps):
        task.step(step, parallel, optimizer)
    task.done(model)


main()
