"""How busy the demo keeps its trainers: the share of wall time that they spend in inner steps, on three nodes."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.table import Row, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="barnraise-bench-") as folder:
        command = [str(Path(sys.executable).with_name("barnraise")), "demo", "--json", "--export", f"{folder}/export"]
        sizes = ["--nodes", str(given.nodes), "--rounds", str(given.rounds)]
        output = subprocess.check_output(command + sizes, text=True)
    summary = json.loads(output.splitlines()[-1])
    shares = summary["busy_share"]
    states = {replica["state"] for replica in summary["replicas"].values()}
    show(
        "utilisation",
        [
            Row("share of time in inner steps, mean", statistics.mean(shares), note="from its first step on"),
            *(Row(f"  node {index}", share) for index, share in enumerate(shares)),
            Row("tokens per second of the whole demo", summary["tokens"] / summary["wall_seconds"], digits=0),
            Row("wall", summary["wall_seconds"], "s", at_most=180, digits=1),
            Row("rounds", summary["rounds_committed"], f"of {given.rounds}", digits=0),
            Row("held-out loss, first", summary["heldout_loss_first"]),
            Row("held-out loss, last", summary["heldout_loss_last"], at_most=summary["heldout_loss_first"]),
            Row("bytes sent per parameter and round", summary["bytes_sent_per_param_per_round"]),
            Row("states that the nodes ended with", len(states), digits=0),
        ],
    )


if __name__ == "__main__":
    main()
