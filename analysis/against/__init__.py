"""A run beside another run, and beside other tools' definitions and clients."""
