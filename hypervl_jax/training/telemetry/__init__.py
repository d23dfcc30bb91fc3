"""How a run is watched: metrics, progress, goodput, utilization, profiles and the watchdog. Nothing here changes what a step computes."""
