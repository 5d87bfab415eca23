"""What both methods use: registration with PEFT, targeting, the delta layer, files, the model card, collectives."""
