"""What can be set, by whom, and what it means."""
