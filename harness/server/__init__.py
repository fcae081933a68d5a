"""Questions to servers before, beside and after the load: what they serve, count and hold. Never the load itself."""
