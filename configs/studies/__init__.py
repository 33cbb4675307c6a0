"""Configs of the commands in `studies`."""
