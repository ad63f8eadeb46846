"""A stand-in for Anthropic. Imports nothing of ours, so that it cannot agree with our mistakes."""
