"""Many conversions, named by their content, shared by workers, and what they trade: sizes, losses, speeds.

grid.py       which runs a sweep has          running.py    one of them, in any process
frontier.py   what no other beats             entry.py      `sweep`: all of it, resumable
"""
