"""A second, deliberately naive implementation of the method in float64, for tests only.

One conversation at a time, without padding, packing or caches; loops over layers, heads and queries; weights are
looked up by name in a plain dictionary. It imports torch and the standard library, nothing of the product.
"""
