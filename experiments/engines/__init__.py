"""Where a sweep's runs are executed: on this machine, through Slurm, or on GKE."""
