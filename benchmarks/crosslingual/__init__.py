"""Trained in English, scored in other languages: `python -m benchmarks.crosslingual`, on tasks of `examples.xglue`."""
