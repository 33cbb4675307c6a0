"""Long checks outside of the test suite, started manually or by CI."""
