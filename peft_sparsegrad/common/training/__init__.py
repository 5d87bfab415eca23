"""Training loops and engines, seen from an adapter: passes, optimizer steps, ranks, pieces of parameters, Trainers."""
