"""From a finished run to something people use: exported programs, answers that say how far to trust them, drift."""
