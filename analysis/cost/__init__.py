"""What the tokens of one run cost: the bill of its window, over the tokens and divided between their kinds."""
