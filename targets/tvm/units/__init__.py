"""A graph, cut into units of work."""
