"""Standard errors, control variates and distances between sets of samples."""
