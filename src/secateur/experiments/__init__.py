"""Studies: what is compared, on which models and data."""
