"""From measured costs and stated terms to what to charge, beside what others ask."""
