"""Schedules as tables: made, lowered, read and written, checked, simulated."""
