"""From a tier to servers and load workers that run: rented machines, the Ray session, placement, supervision."""
