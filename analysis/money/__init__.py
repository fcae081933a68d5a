"""What tokens cost and what to charge: the bill, its divisions, list prices, terms."""
