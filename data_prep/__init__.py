"""Preparation: reads manifests, encodes clips with frozen audio encoders and writes the features as MDS shards."""
