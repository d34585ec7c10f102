"""Studies: several runs of one experiment, and what can be said about their difference."""
