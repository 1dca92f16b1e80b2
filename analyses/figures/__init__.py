"""Pictures of results. matplotlib is the extra `plots`."""
