"""Published and measured cases with known answers, and runs of our own with theirs. All of them: README.md here."""
