"""What works with each method, as a table: `python -m benchmarks.features`."""
