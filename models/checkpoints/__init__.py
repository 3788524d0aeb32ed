"""Checkpoints of official code and of Hugging Face, read into our networks."""
