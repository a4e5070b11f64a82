"""Does the runs of a study: on this machine, in an allocation, or in SLURM's queue."""
