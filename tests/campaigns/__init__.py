"""Long checks that are started by hand or by CI, outside of the test suite."""
