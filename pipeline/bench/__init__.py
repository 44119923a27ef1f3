"""Benchmarks: what the integrations, the training loop and the plans cost or miss on this machine."""
