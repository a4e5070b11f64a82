"""A Ray cluster of two nodes on this machine, for tests: prints its address, then obeys `remove`, `add` and `wait`."""

from __future__ import annotations

import logging
import sys
import time

import ray
from ray.cluster_utils import Cluster

TRAIN_LOOKS_SECONDS = 21.0  # Ray Train looks at the cluster's nodes every 20 s


def main() -> None:
    """Obeys until standard input ends. `remove` kills the second node, as a machine that is lost; `add` waits until the
    cluster knows that one is lost and another is there; `wait` until what an earlier run had is free again, and Ray
    Train, which would begin with one process, knows the new node.
    """
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    added = float("-inf")
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "remove":
            cluster.remove_node(second, allow_graceful=False)
        elif line.strip() == "add":
            second, added = cluster.add_node(num_cpus=1), time.monotonic()
            while sum(node["Alive"] for node in ray.nodes()) != 2 or ray.cluster_resources().get("CPU") != 2:
                time.sleep(0.1)
        else:
            while ray.available_resources().get("CPU") != 2:
                time.sleep(0.1)
            time.sleep(max(0.0, added + TRAIN_LOOKS_SECONDS - time.monotonic()))
        print("\ndone", flush=True)  # Ray writes there too, also lines without an end


if __name__ == "__main__":
    main()
