"""Input formats: `reader` detects the format and yields clips; `json_formats` and `table_formats` read the formats."""
