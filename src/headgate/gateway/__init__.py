"""Service 1: the only holder of the Anthropic key."""
