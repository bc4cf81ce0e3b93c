"""The command line: a file a noun, its verbs inside."""
