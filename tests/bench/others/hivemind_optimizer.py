"""hivemind.Optimizer with local updates: parameters are averaged in fp16 every so many steps of everyone together."""

import hivemind
from dht import meet
from hivemind.compression import Float16Compression
from task import begin

MATCHMAKING_SECONDS = 3.0  # documented: "3-5s for small local runs"
AVERAGING_SECONDS = 15.0  # documented: about twice what an all-reduce takes


def main():
    task = begin()
    dht = meet(task)
    model = task.model()
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id="bench",
        batch_size_per_step=task.batch,
        target_batch_size=task.workers * task.batch * task.inner_steps,
        params=model.parameters(),
        optimizer=task.optimizer,
        use_local_updates=True,
        delay_state_averaging=False,
        state_averaging_compression=Float16Compression(),
        matchmaking_time=MATCHMAKING_SECONDS,
        averaging_timeout=AVERAGING_SECONDS,
        averager_opts={"target_group_size": task.workers, "request_timeout": 2.0},
    )
    task.ready()
    step = 0
    while optimizer.local_epoch < task.steps // task.inner_steps and step < 2 * task.steps:
        task.step(step, model, optimizer, rates=optimizer.opt)
        step += 1
    task.done(model, step)


main()
