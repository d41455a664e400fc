"""What needs a GPU, as three stages with a time limit each; every row is on disk as soon as it is known."""
