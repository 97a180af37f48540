"""Training: recipe rules, the Lightning modules and what a run leaves behind."""
