"""Train a model: the command, its loop, step, optimizer, guards and measurements."""
