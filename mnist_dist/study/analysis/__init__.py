"""What the rows of a study say. Pure functions of rows and numbers: nothing here reads or writes a file."""
