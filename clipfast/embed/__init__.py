"""Features of many pictures or texts in a file, and the nearest among them."""
