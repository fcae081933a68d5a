"""From a tier to servers that answer: rented machines, the Ray session, placement, the servers' supervision."""
