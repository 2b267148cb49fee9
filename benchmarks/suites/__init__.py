"""The suites that `benchmarks.run` runs, and the modules that several of them share."""
