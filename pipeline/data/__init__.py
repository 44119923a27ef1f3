"""Turns prepared feature sets into training batches: sampling order, chat template, collation, loading."""
