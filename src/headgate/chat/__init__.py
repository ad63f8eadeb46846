"""Service 2: the chat backend. Not built yet; its place is kept."""
