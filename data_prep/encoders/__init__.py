"""Frozen audio encoders: `base` is their interface, `build` maps a config to an encoder (add new ones there)."""
