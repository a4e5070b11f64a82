"""The commands, each in one file with its options: `add_options` and `run`. Only `run` imports torch."""
