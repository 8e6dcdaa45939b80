"""How many requests a second the simulator simulates on one core: 16 nodes with the real controller
core and router, 300 adapters, conversation lengths.

    python bench/simulator_speed.py [--policy NAME] [--repeats 5] [--out FILE]

The workload is made before the clock starts; everything else, the warm-up too, is in it. Medians;
one JSON object with machine, commit and command.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from loraserve.placement.policies import DEFAULT_POLICY
from loraserve.profiles.files import load_profile
from loraserve.sim.run import SimulationOptions, make_cluster, workload_of


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", default=DEFAULT_POLICY)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=300)
    parser.add_argument("--rate", type=float, default=64.0)
    parser.add_argument("--duration", type=float, default=600.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    options = SimulationOptions(
        policy=arguments.policy,
        workload="zipf",
        nodes=arguments.nodes,
        adapters=arguments.adapters,
        rate=arguments.rate,
        duration_s=arguments.duration,
        seed=1,
    )
    profile = load_profile(options.profile)
    workload = workload_of(options, profile)
    seconds = []
    for _ in range(arguments.repeats):
        cluster = make_cluster(options, profile, workload)
        begun = time.process_time()
        cluster.run()
        seconds.append(time.process_time() - begun)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    result = {
        "requests": len(workload),
        "finished": len(cluster.meter.finished),
        "events": cluster.events,
        "simulated_s": workload.duration_s,
        "cpu_s": [round(s, 3) for s in seconds],
        "requests_per_cpu_s": round(len(workload) / statistics.median(seconds)),
        "policy": arguments.policy,
        "nodes": arguments.nodes,
        "adapters": arguments.adapters,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "commit": commit.stdout.strip(),
        "command": " ".join(sys.argv),
    }
    text = json.dumps(result)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
