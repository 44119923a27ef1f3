"""ZeRO policies, one JSON file each, which ship with the software."""
