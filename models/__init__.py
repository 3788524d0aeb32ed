"""Torch definitions of the model families, checkpoint importers, the zoo, training recipes."""
