"""Edge half."""
