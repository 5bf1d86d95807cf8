"""On a processor without AVX: what all of a swarm must agree on has the same bits as on this one, and a trainer learns."""

import json
import os
import subprocess
import sys

import pytest
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

from tests import steps

POOR = {
    "NPY_DISABLE_CPU_FEATURES": " ".join(each for each in __cpu_dispatch__ if __cpu_features__.get(each)),
    "OPENBLAS_CORETYPE": "Prescott",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
}


def told(module, more):
    run = [sys.executable, "-m", module]
    return json.loads(subprocess.run(run, env=os.environ | more, stdout=subprocess.PIPE, check=True, timeout=60).stdout)


def test_codecs_rules_and_folds_have_the_same_bits_on_a_poor_processor():
    ours, theirs = told("tests.bits", {}), told("tests.bits", POOR)
    assert len(ours) == 4 * (3 + 2 * 4 + 2)
    assert {name for name in ours if ours[name] != theirs[name]} == set()


def test_a_trainer_learns_on_a_poor_processor_as_on_this_one(tmp_path):
    ours, theirs = steps.losses(tmp_path), told("tests.steps", POOR)
    assert theirs["kernels"] == "DEFAULT"
    assert theirs["losses"] == pytest.approx(ours, rel=1e-4) and ours[-1] < ours[0] / 2
