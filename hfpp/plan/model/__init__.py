"""What a model is to a plan, read from its config.json: layers, their shapes and sizes."""
