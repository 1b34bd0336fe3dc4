"""Whether a model is good, and whether the world has moved."""
