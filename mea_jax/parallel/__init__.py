"""The mesh, the processes, and how batches are placed on devices."""
