"""What is done to a trace before it is replayed: measured, converted, cut, made up, stripped of its words."""
