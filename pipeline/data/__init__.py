"""From a prepared feature set to training batches: which questions when, as which tokens, with which features."""
