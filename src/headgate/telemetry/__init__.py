"""What we say about a request: the log line, metrics, exports, notices."""
