"""The commands, one test file a subject."""
