"""A Ray cluster of two nodes on this machine, for tests: prints its address, then obeys `remove` and `add`."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    """Obeys until standard input ends. `remove` kills the second node, as a machine that is lost."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "remove":
            cluster.remove_node(second, allow_graceful=False)
        else:
            second = cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
        print("done", flush=True)


if __name__ == "__main__":
    main()
