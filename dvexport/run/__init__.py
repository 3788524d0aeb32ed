"""Running artifacts: sessions, the oracle, golden data, and comparisons between them."""
