"""Studies: grids of runs, the store of their results, fits, analyses and figures."""
