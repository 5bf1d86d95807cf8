"""One worker's share of a task that every system is given: the same model, text, order, optimizer and threads.

It runs in the environments of others, so it knows nothing of Barnraise, and Barnraise nothing of it.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

WARMUP_STEPS = 20
WEIGHT_DECAY = 0.01


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Task:
    """What the bench wrote down for this process: a worker, or with `index` null whoever the workers meet at."""

    def __init__(self, path):
        die_with_parent()  # nothing outlives the bench
        os.register_at_fork(after_in_child=die_with_parent)
        for key, value in json.loads(Path(path).read_text()).items():
            setattr(self, key, value)
        torch.set_num_threads(1)
        torch.manual_seed(self.seed)
        tokens = np.load(self.tokens, mmap_mode="r")
        self._table = np.lib.stride_tricks.sliding_window_view(tokens, self.context + 1)[:: self.context]
        self._order = np.random.default_rng(self.seed).permutation(len(self._table))

    def model(self):
        model = LlamaForCausalLM(LlamaConfig(**self.config))
        model.load_state_dict(torch.load(self.initial))
        return model

    def optimizer(self, parameters):
        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=WEIGHT_DECAY)

    def warm_up(self, optimizer, step):
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)

    def backward(self, model, step):
        """The gradient of this worker's batch of this step."""
        first = (step * self.workers + self.index) * self.batch
        rows = torch.from_numpy(self._table[self._order[first : first + self.batch]].astype(np.int64))
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()

    def step(self, number, model, optimizer, *, rates=None):
        """One step. `rates` is the optimizer that has the learning rates, where another is wrapped around it."""
        self.warm_up(rates or optimizer, number)
        optimizer.zero_grad()
        self.backward(model, number)
        optimizer.step()

    def say(self, what):
        print(f"bench: {what}", flush=True)

    def ready(self):
        """Everyone begins at once."""
        self.say("ready")
        sys.stdin.readline()

    def done(self, model, steps=None):
        """Hand in the model, and stay until everyone has: peers may still need this one."""
        torch.save({key: value.detach().clone() for key, value in model.state_dict().items()}, self.final)
        self.say(f"done {self.steps if steps is None else steps}")
        sys.stdin.readline()


def begin():
    return Task(sys.argv[1])
