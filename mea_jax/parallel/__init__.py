"""Make the mesh, join the processes of a run, and place batches on devices."""
