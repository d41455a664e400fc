"""A text-to-image pipeline for emoji: ``train`` trains every part of it."""
