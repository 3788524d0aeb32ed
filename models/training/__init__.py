"""Training: recipes, losses, the procedural motion data set."""
