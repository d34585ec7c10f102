"""What notebooks and the command line do with networks; it may import all rooms but studies, and no room imports it."""
