"""What a training step costs on a TPU pod, found on a CPU machine: chips, FLOPs, compiled programs, bounds."""
