"""The exactly-once preparation job on Ray: `ray_actors` starts the actors, `extract_partition` is their work."""
