"""Published and measured cases with known answers. Source and licence of each: README.md here."""
