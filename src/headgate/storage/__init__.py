"""What outlives a request: protocols and their adapters."""
