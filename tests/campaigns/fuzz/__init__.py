"""Random inputs, and checks that the package accepts or refuses each of them properly."""
