"""What a start of a launch knows of earlier starts, if its launcher starts all processes again when one is lost.

The launcher's store outlives the processes. It holds addresses of dead processes, and a new process that reads them
fails or hangs. So the processes of each start meet under other names. The store also holds the folder that an earlier
start has opened, and whether the run has ended in a way that another start does not change.
"""

from __future__ import annotations

from datetime import timedelta

from mnist_dist.processes.launch_environment import Launch
from mnist_dist.processes.rendezvous import Facts, Meeting
from mnist_dist.processes.stores import LOOPBACK, store_at

FOLDER, END = "mnist_dist/folder", "mnist_dist/end"


class RestartState:
    """The starts of this launch, as the launcher's store knows them. Raises `UserError` if it is not reached."""

    def __init__(self, launch: Launch, timeout_s: float) -> None:
        self.launch, self.timeout_s = launch, timeout_s
        # the store is torchrun's, whose variables the user expects
        self._why = "" if launch.has_store else launch.variables
        self._store = store_at(LOOPBACK if launch.is_one_machine and not launch.has_store else launch.master_address,
                               launch.master_port, setting="MASTER_ADDR", timeout_s=timeout_s, why=self._why,
                               hosts_it=launch.rank == 0 and not launch.has_store,
                               is_elsewhere=launch.rank >= launch.local_size)

    def meet(self, facts_here: Facts, backend: str) -> list[Facts]:
        """Make the process group of this start, which Accelerate takes as it is. The facts of all ranks. Raises
        `UserError` if one does not come, or is not like the others. Collective.
        """
        from torch.distributed import PrefixStore, init_process_group

        # a store that is made at each start needs no such name: after machines have come and gone, their
        # launchers have counted differently
        start = self.launch.restart if self.launch.has_store else 0
        store = PrefixStore(f"start-{start}", self._store)
        facts = Meeting(store, self.launch.rank, self.launch.size, self.timeout_s, why=self._why).facts(facts_here)
        init_process_group(backend, store=store, rank=self.launch.rank, world_size=self.launch.size,
                           timeout=timedelta(seconds=self.timeout_s))
        return facts

    @property
    def folder(self) -> str | None:
        """The folder that an earlier start has opened for its run."""
        return self._read(FOLDER)

    @folder.setter
    def folder(self, folder: str) -> None:
        self._write(FOLDER, folder)

    @property
    def end(self) -> tuple[int, str] | None:
        """Exit status and message of an earlier start that has ended for good."""
        status, _, message = (self._read(END) or "").partition(" ")
        return (int(status), message) if status else None

    @end.setter
    def end(self, end: tuple[int, str]) -> None:
        self._write(END, f"{end[0]} {end[1]}")

    def _read(self, name: str) -> str | None:
        return self._store.get(name).decode() if self.launch.restart and self._store.check([name]) else None

    def _write(self, name: str, text: str) -> None:
        self._store.set(name, text)
        self._store.get(name)  # `set` does not wait for the store; an answer to this comes after the text is stored
