"""Pictures of what a model learned, and the report that holds them."""
