"""Checks whether a model's stages compute what the unsplit model computes."""
