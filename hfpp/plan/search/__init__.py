"""Finding the best plans for a model on a cluster."""
