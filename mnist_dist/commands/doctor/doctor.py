"""`mnist-dist doctor`: is this machine, or this launch, fit for a study?

Each machine is examined (machine.py). Under a launcher the ranks then measure their network (bandwidth.py),
take the same step, and are compared: a slow link, a slow rank or a rank that computes something else is named. Each
problem comes with its remedy.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mnist_dist.commands.doctor import machine
from mnist_dist.commands.doctor.bandwidth import all_reduces, pair_bandwidths
from mnist_dist.commands.doctor.machine import Finding
from mnist_dist.config import REFERENCE_BATCH_SIZE, TrainConfig
from mnist_dist.output import say
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.processes.network_interface import VARIABLE, choose_interface
from mnist_dist.processes.team import Team, join
from mnist_dist.text import counted
from mnist_dist.training.model import MLP
from mnist_dist.training.steps.plain import loss_sum

SLOW_RANK, SLOW_LINK = 1.5, 0.5  # times the usual step; parts of the usual bandwidth
SLOW_NETWORK = 12.5e6  # bytes per second: 100 Mbit/s between two hosts is no cluster's network
ROUNDS, STEPS = 5, 20  # of the step's clock: the best round of a rank counts
SAME_GRADIENT = 1e-4  # relative: processors of different makes round differently


def _here(config: TrainConfig, launch: Launch) -> list[Finding]:
    """The findings about this machine."""
    return [*machine.versions(), *machine.cores(torch.get_num_threads(), launch.local_size), *machine.products(),
            *machine.gpus(), *machine.data(config.dataset, config.data_dir, config.mirror),
            *machine.disk(Path(config.output_dir or "runs")), *machine.tracking(config.wandb)]


def _gradient_and_clock(team: Team) -> tuple[torch.Tensor, float]:
    """The gradient of one fixed batch, and the milliseconds of a step without an exchange: the best of some rounds."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (REFERENCE_BATCH_SIZE, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (REFERENCE_BATCH_SIZE,), generator=generator)
    images, labels = images.to(team.device), labels.to(team.device)
    torch.manual_seed(0)
    module = MLP().to(team.device)

    def gradient() -> torch.Tensor:
        loss = loss_sum(module, images, labels, torch.float32)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(module.parameters()))])

    first_gradient, medians = gradient(), []
    for _ in range(ROUNDS):
        team.barrier()
        seconds = []
        for _ in range(STEPS):
            begin = time.perf_counter()
            gradient()
            team.wait_for_device()
            seconds.append(time.perf_counter() - begin)
        medians.append(1000 * statistics.median(seconds))
    return first_gradient, min(medians)


def _place(team: Team, rank: int) -> str:
    return f"process {rank} on {team.hosts[rank]}"


def _steps(team: Team) -> Iterator[Finding]:
    """Whether all ranks compute the same, and equally fast. Collective."""
    gradient, own_ms = _gradient_and_clock(team)
    gradients, clocks = team.gather(gradient), team.share(own_ms)
    scale = gradients[0].abs().max()
    apart = ((gradients - gradients[0]).abs().amax(1) / scale).tolist()
    middle = gradients.median(dim=0).values
    far = ((gradients - middle).abs().amax(1) / scale).tolist()
    problem = remedy = None
    if not all(value <= SAME_GRADIENT for value in apart):  # also if one is not a number
        worst = max(range(team.size), key=lambda rank: float("inf") if far[rank] != far[rank] else far[rank])
        problem = f"the gradient of {_place(team, worst)} differs from the others' by {far[worst]:.1g} of the largest"
        remedy = "take this machine, or this GPU, out: it computes something else"
    same = "the same bits" if max(apart) == 0 else f"within {max(apart):.0e} of each other"
    yield Finding("gradient", f"on {counted(team.size, 'process', 'processes')} {same}",
                  {"largest_difference": max(apart)}, problem, remedy)
    problem = remedy = None
    slowest, usual = max(range(team.size), key=clocks.__getitem__), statistics.median_low(clocks)
    if clocks[slowest] > SLOW_RANK * usual:
        problem = f"a step of {_place(team, slowest)} takes {clocks[slowest]:.2f} ms, the others' {usual:.2f} ms"
        remedy = "see what else runs there, its clock rate and its temperature: every step waits for the slowest one"
    yield Finding("step", f"{min(clocks):.2f} to {clocks[slowest]:.2f} ms of work per process at batch "
                  f"{REFERENCE_BATCH_SIZE}", clocks, problem, remedy)


def _size(number: int) -> str:
    power = min(2, (number.bit_length() - 1) // 10)
    return f"{number >> 10 * power} {('B', 'KiB', 'MiB')[power]}"


def _fabric(team: Team, interface: str | None) -> Iterator[Finding]:
    """Latency and bandwidth of the network between the ranks. Collective."""
    points = all_reduces(team)
    over = f" over {interface}" if interface else ""
    yield Finding("all-reduce", f"latency {1e6 * points[0].seconds:,.0f} us, bus bandwidth up to "
                  f"{max(point.bus_bandwidth for point in points) / 1e9:.3g} GB/s ({team.size} processes{over})",
                  [asdict(point) for point in points], details=("     size   time, us  algorithm, GB/s  bus, GB/s", *(
                      f"{_size(point.bytes):>9} {1e6 * point.seconds:10,.1f} {point.algorithm_bandwidth / 1e9:16.4f} "
                      f"{point.bus_bandwidth / 1e9:10.4f}" for point in points)))
    pairs = pair_bandwidths(team)
    if not pairs:
        return
    hosts = list(dict.fromkeys(team.hosts))
    # the best pair of each host: with three hosts a slow host slows two of three pairs
    problem = None
    usual = statistics.median(max(rate for pair, rate in pairs.items() if host in pair) for host in hosts)
    slow = {pair: rate for pair, rate in pairs.items() if rate < SLOW_LINK * usual}
    of_host = [host for host in hosts if all(pair in slow for pair in pairs if host in pair)]
    if not slow and usual < SLOW_NETWORK:
        problem = f"{8 * usual / 1e6:.0f} Mbit/s between the hosts is slow for a cluster"
    elif slow:
        what = f"the link of {of_host[0]}" if of_host else " and ".join(f"the link {a} - {b}" for a, b in slow)
        problem = f"{what} has {8 * min(slow.values()) / 1e6:,.0f} Mbit/s, the others {8 * usual / 1e6:,.0f}"
    yield Finding("links", ", ".join(f"{a} - {b} {8 * point / 1e6:,.0f} Mbit/s" for (a, b), point in pairs.items()),
                  [{"hosts": pair, "bytes_per_second": point} for pair, point in pairs.items()], problem,
                  problem and "check the cable, the port and the switch, and that GLOO_SOCKET_IFNAME (on GPUs "
                              "NCCL_SOCKET_IFNAME) names the fast interface")


def _differences(by_host: dict[str, list[Finding]]) -> Iterator[Finding]:
    """What must be the same on all hosts."""
    digests = {host: next((finding.value for finding in findings if finding.name == "data"), None)
               for host, findings in by_host.items()}
    if len({digest for digest in digests.values() if digest is not None}) > 1:
        says = ", ".join(f"{digest and digest[:12]} on {host}" for host, digest in digests.items())
        yield Finding("data", says, digests, f"the data differs: {says}", "copy the same files to every machine")


def examine(config: TrainConfig, launch: Launch) -> list[Finding]:
    """Everything that is found out about this launch; on the main process, elsewhere nothing. Collective."""
    named = os.environ.get(VARIABLE)  # by the user
    interface = choose_interface(launch) or named
    team = join(launch, timeout_s=config.timeout, options=config.common, mixed_precision="no", dynamo_backend="no")
    here = _here(config, launch) if launch.local_rank == 0 else []
    by_host: dict[str, list[Finding]] = {}
    for host, of_host in zip(team.hosts, team.share(here), strict=True):
        by_host.setdefault(host, []).extend(of_host)
    findings = [replace(finding, says=f"{host}: {finding.says}" if len(by_host) > 1 else finding.says,
                        problem=finding.problem and f"on {host}: {finding.problem}")
                for host, of_host in by_host.items() for finding in of_host]
    backend = torch.distributed.get_backend() if team.size > 1 else "alone"
    device = str(team.device) if team.is_cuda else team.device.type  # the CPU has no number
    ranks = [{"rank": rank, "host": host, **described} for rank, (host, described) in enumerate(zip(
        team.hosts, team.share({"device": f"{device} ({backend})", "backend": backend, "interface": interface}),
        strict=True))]
    said = ", ".join("{rank} on {host}: {device}".format(**rank) for rank in ranks)
    findings.append(Finding("processes", said, ranks))
    if team.clocks_apart:
        findings.append(Finding("clocks", "apart", None, team.clocks_apart, "timedatectl set-ntp true on each host"))
    findings += [*_differences(by_host), *_steps(team), *(_fabric(team, interface) if team.size > 1 else ())]
    is_main = team.is_main
    team.end()
    return findings if is_main else []


def doctor(config: TrainConfig, launch: Launch, as_json: bool) -> int:
    """Examine and print; 1 if anything is wrong, else 0. Raises `UserError` if the processes cannot be joined."""
    findings = examine(config, launch)
    problems = sum(finding.problem is not None for finding in findings)
    if findings and as_json:
        say(json.dumps({"healthy": not problems, "findings": list(map(asdict, findings))}, indent=1))
    elif findings:
        say("\n".join(machine.lines(findings)))
        say("healthy" if not problems else f"{counted(problems, 'problem')}: see LOOK")
    return int(problems > 0)
