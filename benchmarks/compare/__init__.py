"""Methods compared on one real model: `python -m benchmarks.compare run --help`, then `... report results.jsonl`.

Every run is one method, task, seed and learning rate, and one JSON line. The same seed gives every method the same
training rows in the same order and the same task head, so that differences between methods are paired.
"""
