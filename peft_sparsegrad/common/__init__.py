"""The parts that both methods use: registration, targeting, the delta layer, files, the model card, collectives."""
