"""Timing of operators and whole UNets on the current device, and the GPU suite, which runs all of it."""
