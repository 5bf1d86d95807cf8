"""OpenDiLoCo's optimizer on hivemind: pseudo-gradients in fp16, Nesterov outside. Not on PyPI: `open_diloco` must be importable."""

from functools import partial

import torch
from dht import meet
from hivemind.compression import Float16Compression
from open_diloco.hivemind_diloco import AllReduceStrategy, DiLoCoOptimizer
from task import WEIGHT_DECAY, begin

MATCHMAKING_SECONDS = 3.0


def main():
    task = begin()
    dht = meet(task)
    model = task.model()
    optimizer = DiLoCoOptimizer(
        dht=dht,
        run_id="bench",
        batch_size=task.batch,
        num_inner_steps=task.inner_steps,
        params=list(model.parameters()),
        inner_optimizer=partial(torch.optim.AdamW, lr=task.learning_rate, weight_decay=WEIGHT_DECAY),
        outer_optimizer=partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
        matchmaking_time=MATCHMAKING_SECONDS,
        all_reduce_strategy=AllReduceStrategy.WAIT_FOR_ALL,
        grad_compression=Float16Compression(),
    )
    task.ready()
    for step in range(task.steps):
        task.step(step, model, optimizer, rates=optimizer.state_averager.inner_optimizer)
    task.done(model)


main()
