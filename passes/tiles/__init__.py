"""Tiles as matrix products over pixel rows: the lowering for graph runtimes, and what it is made of."""
