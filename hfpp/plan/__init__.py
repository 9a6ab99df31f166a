"""Plans: pure functions over plain data, without torch."""
