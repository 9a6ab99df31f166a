"""How layers are divided among stages: the grammar of partitions, and balanced ones."""
