"""What the parts of a model cost on a device, measured."""
