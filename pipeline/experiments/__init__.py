"""Scaling experiments: the trials of a sweep, their trends and answers, and the report of an experiment."""
