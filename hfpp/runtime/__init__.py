"""Turning a plan into torch objects and running them."""
