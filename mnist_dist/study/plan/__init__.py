"""What a study consists of: its grid, its goals, and the table of its runs."""
