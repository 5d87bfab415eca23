"""Runs, results, tables and the table of methods: what the examples and the benchmarks share."""
