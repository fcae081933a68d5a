"""A reader for each trace format: bytes of a file come in, `TraceRecord` goes out."""
