"""MLflow: `writer` records runs through `shipper`, `reader` reads them back."""
