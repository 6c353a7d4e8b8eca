"""What is measured against each other: one module per way to take a training step, each run in a process of its own."""
