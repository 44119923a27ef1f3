"""YAML files of the experiments that ship with the software."""
