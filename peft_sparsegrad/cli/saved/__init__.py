"""Adapters as they lie on the disk: read from their two files alone, one tensor at a time."""
