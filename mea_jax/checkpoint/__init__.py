"""Write, verify and read the files of a run."""
