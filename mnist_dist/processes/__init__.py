"""How the processes of a run are started, find each other, and meet."""
