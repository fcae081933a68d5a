"""What can be served and rented: models and their weights, hardware tiers and their dated prices."""
