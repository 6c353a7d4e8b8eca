"""Fast paths of the training step, one file each, with a plain-torch reference beside it."""
