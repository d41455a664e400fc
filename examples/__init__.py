"""Examples. Run them from the repository's root; they are not installed."""
