"""The streaming HTTP client: prepared requests and the clock go in, one result row for each request comes out."""
