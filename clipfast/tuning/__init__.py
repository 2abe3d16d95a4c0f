"""``clipfast tune``: this machine measures which implementation of every op is its fastest."""
