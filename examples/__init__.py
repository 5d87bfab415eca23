"""Programs that fine-tune, from a clone of the repository: `python -m examples.quickstart`."""
