"""What Anthropic's bytes mean. Pure: facts, no opinions."""
