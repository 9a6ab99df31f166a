"""Is a pipeline of a model exact? The unsplit model against its stages, chained in one process."""
