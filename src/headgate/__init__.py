"""Headgate: the production stack for apps on the Claude API."""
