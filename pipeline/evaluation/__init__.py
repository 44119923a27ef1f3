"""Evaluation: generates answers to a question set, scores them, and computes intervals and baselines."""
