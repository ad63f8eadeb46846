"""Headgate: the production stack for apps on the Claude API."""

__version__ = "0.1.0"
