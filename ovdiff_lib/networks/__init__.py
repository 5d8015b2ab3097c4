"""The frozen networks: where their weights are, loading them once, looking inside."""
