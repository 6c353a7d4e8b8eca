"""The test suite, a package so that its tools can be imported by name from a started process."""
