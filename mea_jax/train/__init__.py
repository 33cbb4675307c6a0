"""The training command, its loop, step, optimizer, guards and metrics."""
