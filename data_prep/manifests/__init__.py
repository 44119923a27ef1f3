"""Input formats: `reader` detects the format, `*_formats` read it, `clips` decides which rows are the same clip."""
