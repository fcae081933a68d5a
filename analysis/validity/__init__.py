"""Is a run evidence? Checks of the generator, the servers and the rows; failed gates make it INVALID."""
