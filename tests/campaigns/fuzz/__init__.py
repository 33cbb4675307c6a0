"""What no one wrote by hand: random inputs, and what the package has to make of each."""
