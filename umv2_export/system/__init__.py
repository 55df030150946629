"""The machine below: files and folders, their links, what may be written, memory, and how a process ends."""
