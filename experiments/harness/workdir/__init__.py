"""What lies in a work directory, and what it depends on."""
