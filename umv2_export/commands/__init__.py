"""The commands, one file each: its options, its call, what it prints.

A file is loaded for a command, and for the list of all. What is heavy is imported inside the command that needs it.
"""
