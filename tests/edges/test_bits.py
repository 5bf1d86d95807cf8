"""What all of a swarm must agree on has the same bits on a processor without AVX as on this one."""

import json
import os
import subprocess
import sys

from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

POOR = {
    "NPY_DISABLE_CPU_FEATURES": " ".join(each for each in __cpu_dispatch__ if __cpu_features__.get(each)),
    "OPENBLAS_CORETYPE": "Prescott",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}


def told(more):
    run = [sys.executable, "-m", "tests.bits"]
    return json.loads(subprocess.run(run, env=os.environ | more, stdout=subprocess.PIPE, check=True, timeout=60).stdout)


def test_codecs_rules_and_folds_have_the_same_bits_on_a_poor_processor():
    ours, theirs = told({}), told(POOR)
    assert len(ours) == 4 * (3 + 2 * 4 + 2)
    assert {name for name in ours if ours[name] != theirs[name]} == set()
