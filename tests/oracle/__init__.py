"""A second, deliberately naive implementation of the method in float64, for tests only.

It computes one conversation at a time, without padding, packing or caches, in loops over layers, heads and queries, and
looks weights up by name in a plain dictionary. It imports torch and the standard library, nothing from `pipeline`.
"""
