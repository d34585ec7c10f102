"""Which network, which way of adapting it: a race under a budget. It may import studies and api."""
