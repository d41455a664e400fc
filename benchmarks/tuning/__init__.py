"""The search for launch configurations."""
