"""A trainer's first steps in this process, on the processor that is there: `python -m tests.steps` prints their losses."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from node.trainer import Learner
from node.training import TrainerSpec, Vectors
from protocol import model

CONTEXT, VOCABULARY, BATCH, STEPS = 32, 64, 8, 12
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TRAIN = {"optimizer": "muon", "learning_rate": 3e-3, "batch_sequences": BATCH, "warmup_steps": 2}


def losses(folder: Path) -> list[float | None]:
    config = model.model_config("llama", SHAPE, vocabulary=VOCABULARY, context=CONTEXT)
    size = model.measure(config)
    vectors = Vectors.create(size.parameters, runtime_dir=folder)
    try:
        vectors.shared[:] = model.initial_vector(config, 1)
        learner = Learner(TrainerSpec(config, size.parameters, size.digest, VOCABULARY, CONTEXT, 1, TRAIN), vectors)
        tokens = np.arange(BATCH * CONTEXT).reshape(BATCH, CONTEXT) % VOCABULARY
        return [learner.step(tokens, np.roll(tokens, -1), lambda: False) for _ in range(STEPS)]
    finally:
        vectors.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="barnraise-steps-") as folder:
        print(json.dumps({"kernels": torch.backends.cpu.get_cpu_capability(), "losses": losses(Path(folder))}))
